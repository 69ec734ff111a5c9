"""Check: what faults cost. A rank is killed, a checkpoint and a shard are damaged, a rank stalls.

Recovery is the time from the fault to the first new batch, as a launcher that restarts at once would have it, without
the start of interpreters. Batches lost are those that are trained again.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.manifest import DATA_SUFFIX
from moefoundry.checkpoint.run_dir import store_of
from moefoundry.config import Recipe
from moefoundry.runs.metrics import read_metrics
from moefoundry.verify.ranks import RankError, World
from moefoundry.verify.result import Result
from moefoundry.verify.runs import (
    POLL_SECONDS,
    SHARED,
    first_difference,
    last_batch,
    metrics,
    prepared,
    recipe_of_run,
    run,
    train_quietly,
    wait_for_batch,
)
from moefoundry.verify.twin import BATCHES, SAVED_EVERY, Twin

STRUCK_AFTER = 5
STALL_SECONDS = 2.0
DETECTION_SECONDS, RECOVERY_SECONDS = 30.0, 60.0
MOST_LOST = 2 * SAVED_EVERY
"""Batches: two intervals, where the newest checkpoint cannot be read."""


def check(twin: Twin) -> Iterator[Result]:
    """Injure runs, and watch them go on."""
    prepared(twin)
    whole = recipe_of_run(twin, "unharmed", SHARED)
    seconds = timed(twin, whole)
    expected = metrics(Path(whole.run_dir))
    yield share_of_saves(Path(whole.run_dir), seconds)
    yield from killed(twin, expected)
    yield from damaged(twin, expected)
    yield damaged_data(twin)
    yield from stalled(twin, expected, seconds)


def timed(twin: Twin, recipe: Recipe, stall_seconds: float = 0.0) -> float:
    """Train to the end; give the seconds from the first save on, in which a rank may be stopped for some time."""
    with World(train_quietly, recipe, ranks=2, room=twin.room, gpu=twin.gpu) as world:
        wait_for_batch(world, Path(recipe.run_dir), SAVED_EVERY)
        begun = time.monotonic()
        if stall_seconds:
            world.signal(1, signal.SIGSTOP)
            time.sleep(stall_seconds)
            world.signal(1, signal.SIGCONT)
        world.results()
        return time.monotonic() - begun


def share_of_saves(run_dir: Path, seconds: float) -> Result:
    """Measure how much of a run stands still for saves, which are not in the background here."""
    later = [line for line in read_metrics(run_dir) if line["batch"] > SAVED_EVERY]
    stalls = [line["checkpoint/stall_seconds"] for line in later if "checkpoint/stall_seconds" in line]
    share = sum(stalls) / seconds
    detail = f"{len(stalls)} saves in {len(later)} batches of {seconds / len(later):.2f} s"
    return Result("stall share of saves", None, share, detail=detail)


def killed(twin: Twin, expected: dict[int, dict[str, Any]]) -> Iterator[Result]:
    """Kill one rank; the others have to notice."""
    claim = "a killed rank ends the others, seconds"
    recipe = recipe_of_run(twin, "killed-rank", SHARED, autoresume=True)
    run_dir = Path(recipe.run_dir)
    with World(train_quietly, recipe, ranks=2, room=twin.room, gpu=twin.gpu) as world:
        wait_for_batch(world, run_dir, STRUCK_AFTER)
        struck = time.monotonic()
        world.signal(1, signal.SIGKILL)
        while world.alive() and time.monotonic() < struck + DETECTION_SECONDS:
            time.sleep(POLL_SECONDS)
        noticed = time.monotonic() - struck
    yield Result(claim, noticed < DETECTION_SECONDS, noticed, DETECTION_SECONDS)
    yield from recovered(twin, recipe, expected, "after a killed rank", SAVED_EVERY)


def damaged(twin: Twin, expected: dict[int, dict[str, Any]]) -> Iterator[Result]:
    """Flip a byte of the newest checkpoint; the one before it has to take its place."""
    recipe = recipe_of_run(twin, "damaged", SHARED, autoresume=True)
    run_dir = Path(recipe.run_dir)
    with World(train_quietly, recipe, ranks=2, room=twin.room, gpu=twin.gpu) as world:
        wait_for_batch(world, run_dir, STRUCK_AFTER)
        world.kill()
    store = store_of(run_dir)
    flip_a_byte(store.path(store.batches()[-1]), DATA_SUFFIX)
    yield from recovered(twin, recipe, expected, "from a damaged checkpoint", MOST_LOST)


def flip_a_byte(directory: Path, suffix: str) -> Path:
    """Flip one byte in the middle of the largest file with this suffix; give the file."""
    file = max(directory.glob(f"*{suffix}"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))
    return file


def recovered(
    twin: Twin, recipe: Recipe, expected: dict[int, dict[str, Any]], what: str, most_lost: int
) -> Iterator[Result]:
    """Go on with a run, and measure how long it takes to a new batch, and how much is trained again."""
    run_dir = Path(recipe.run_dir)
    before = last_batch(run_dir)
    (run_dir / "metrics.jsonl").rename(run_dir / "before.jsonl")
    begun = time.monotonic()
    with World(train_quietly, recipe, ranks=2, room=twin.room, gpu=twin.gpu) as world:
        wait_for_batch(world, run_dir, 1)
        seconds = time.monotonic() - begun
        world.results()
    got = metrics(run_dir)
    lost = before - min(got) + 1
    yield Result(f"recovery seconds {what}", seconds <= RECOVERY_SECONDS, seconds, RECOVERY_SECONDS)
    yield Result(f"batches lost {what}", lost <= most_lost, float(lost), float(most_lost), f"{before} were done")
    first, _ = first_difference(got, {batch: values for batch, values in expected.items() if batch >= min(got)})
    yield Result(f"the same bits {what}", not first, detail=first or f"batches {min(got)} to {BATCHES}")


def damaged_data(twin: Twin) -> Result:
    """Flip a byte of a shard; the run has to end and name it, and train on nothing of it."""
    claim = "a damaged shard ends the run by name"
    (name, source), *_ = twin.recipe.train_loader.dataset.sources.items()
    local, place = Path(source.local), twin.room / "damaged-data"
    shutil.copytree(local.parent, place)
    file = flip_a_byte(place / local.name / str(source.split), ".mds")
    recipe = recipe_of_run(twin, "damaged-shard", SHARED)
    dataset = recipe.train_loader.dataset
    if dataset.streams:
        streams = dataset.streams | {name: replace(dataset.streams[name], local=str(place / local.name))}
        dataset = replace(dataset, streams=streams)
    else:
        dataset = replace(dataset, local=str(place / local.name))
    if dataset.validate_hash is None:
        return Result(claim, None, detail="validate_hash is null")
    recipe = replace(recipe, train_loader=replace(recipe.train_loader, dataset=dataset))
    try:
        run(twin, recipe)
    except RankError as error:
        return Result(claim, file.name in str(error), detail=str(error).replace(f"{twin.room}/", ""))
    return Result(claim, False, detail="it was trained on")


def stalled(twin: Twin, expected: dict[int, dict[str, Any]], seconds: float) -> Iterator[Result]:
    """Stop a rank for a while; the others have to wait, and no longer than that."""
    recipe = recipe_of_run(twin, "stalled", SHARED)
    with_stall = timed(twin, recipe, STALL_SECONDS)
    first, _ = first_difference(metrics(Path(recipe.run_dir)), expected)
    share = max(0.0, with_stall - seconds) / with_stall
    detail = f"stopped for {STALL_SECONDS:g} s of {with_stall:.1f} s; without, {seconds:.1f} s"
    yield Result("stall share of a rank that is stopped", None, share, detail=detail)
    yield Result("the same bits after a stall", not first, detail=first or f"batches 1 to {BATCHES}")
