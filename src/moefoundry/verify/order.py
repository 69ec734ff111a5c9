"""Check: batches are the same on any number of ranks and loader processes, and no batch comes twice.

Global batches are compared as sets of rows: which rank and which place a row has does not matter. Of the data that are
made here, an epoch is read to its end: each row comes as often as the recipe's streams ask for, and no more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from moefoundry.build import build_data
from moefoundry.config import Recipe
from moefoundry.data.fit import all_absent, check_data
from moefoundry.verify.made_data import make_data
from moefoundry.verify.ranks import World
from moefoundry.verify.result import Result
from moefoundry.verify.twin import ROWS, Twin

OWN_BATCHES = 8
"""Global batches that are read of the recipe's own data."""
WHOLE = 10**6


class Epoch(NamedTuple):
    """Batches of an epoch.

    Attributes:
        batches: Of each global batch, the digests of its rows, sorted.
        announced: Batches that the loader says an epoch has.
        times: How often a row may come.
    """

    batches: list[tuple[str, ...]]
    announced: int
    times: int


def check(twin: Twin) -> Iterator[Result]:
    """Read data in several ways: the recipe's own, if they are here, and those that are made."""
    own, reason = own_data(twin.original)
    if own is not None:
        yield from results(twin, own, "the recipe's own data", OWN_BATCHES)
    with World(make_data, twin.recipe, ranks=1, room=twin.room) as world:
        world.results()
    yield from results(twin, twin.recipe, "data made here" + (f" ({reason})" if reason else ""), WHOLE)


def own_data(recipe: Recipe) -> tuple[Recipe | None, str]:
    """Give the recipe to read its own data with, or else the reason why they are not read."""
    if any(source.remote is not None for source in recipe.train_loader.dataset.sources.values()):
        return None, "the recipe's lie elsewhere"
    if all_absent(recipe):
        return None, "the recipe's are not on this machine"
    check_data(recipe)
    return replace(recipe, global_train_batch_size=ROWS), ""


def results(twin: Twin, recipe: Recipe, which: str, most: int) -> Iterator[Result]:
    """Compare what ways to read the same data give."""
    ways = [(1, 0), (2, 0), (2, 2), (twin.ranks, 1)]
    found = {way: read(twin, recipe, *way, most) for way in ways}
    first = found[1, 0]
    claim = "batches do not depend on ranks or workers"
    for (ranks, workers), epoch in found.items():
        for number, (mine, theirs) in enumerate(zip(epoch.batches, first.batches, strict=False), start=1):
            if mine != theirs:
                text = f"{which}: {ranks} ranks with {workers} workers have other rows in batch {number}"
                yield Result(claim, False, detail=text)
                return
    rows = len(first.batches) * ROWS
    yield Result(claim, True, detail=f"{len(ways)} ways to read {rows} rows of {which}")
    for (ranks, workers), epoch in found.items():
        if problem := repeated(epoch, most):
            way = f"{ranks} ranks with {workers} workers"
            yield Result("no batch comes twice, and none is left out", False, detail=f"{which}, {way}: {problem}")
            return
    yield Result("no batch comes twice, and none is left out", True, detail=f"{len(first.batches)} batches of {which}")


def repeated(epoch: Epoch, most: int) -> str:
    """Say which batch or row comes too often, or that batches are missing; empty if all is well."""
    asked = min(epoch.announced, most)
    if len(epoch.batches) != asked:
        return f"{len(epoch.batches)} batches, and the loader has {asked}"
    seen: dict[tuple[str, ...], int] = {}
    for number, rows in enumerate(epoch.batches, start=1):
        if rows in seen:
            return f"batch {number} is batch {seen[rows]} again"
        seen[rows] = number
    if most < WHOLE:
        return ""
    row, times = Counter(row for rows in epoch.batches for row in rows).most_common(1)[0]
    if times > epoch.times:
        number = next(number for number, rows in enumerate(epoch.batches, start=1) if row in rows)
        return f"a row of batch {number} comes {times} times, and {epoch.times} is asked for"
    return ""


def read(twin: Twin, recipe: Recipe, ranks: int, workers: int, most: int) -> Epoch:
    """Read the first batches of an epoch in a world of ranks."""
    loader = replace(recipe.train_loader, num_workers=workers)
    recipe = replace(recipe, train_loader=loader)
    with World(read_epoch, recipe, most, ranks=ranks, room=twin.room) as world:
        parts: list[Epoch] = world.results()
    batches = [
        tuple(sorted(row for rows in batch for row in rows)) for batch in zip(*(p.batches for p in parts), strict=True)
    ]
    return parts[0]._replace(batches=batches)


def read_epoch(recipe: Recipe, most: int) -> Epoch:
    """Read this rank's part of the first batches of an epoch."""
    loader = build_data(recipe.train_loader, recipe, recipe.global_train_batch_size // dist.get_world_size()).dataloader
    dataset = loader.dataset
    batches = [rows_of(batch) for batch in islice(loader, most)]
    if recipe.curriculum is not None:  # whose epochs end with its stages, and say no length
        return Epoch(batches, len(batches), len(batches) * ROWS)
    chosen = zip(dataset.streams, dataset.sources, strict=True)
    times = max(math.ceil(stream.choose / max(source.rows, 1)) for stream, source in chosen)
    return Epoch(batches, len(loader), times)


def rows_of(batch: dict[str, Tensor]) -> tuple[str, ...]:
    """Digest each row of a batch."""
    digests = []
    for row in range(len(batch["input_ids"])):
        digest = blake2b(digest_size=12)
        for name in sorted(batch):
            digest.update(batch[name][row].contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    return tuple(digests)
