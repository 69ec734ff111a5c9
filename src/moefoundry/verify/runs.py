"""Whole runs of a twin, by the functions that train any recipe, and what they leave."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moefoundry.config import MeshConfig, Recipe
from moefoundry.runs.metrics import FILE_NAME, read_metrics
from moefoundry.trainer import train
from moefoundry.verify.made_data import make_data
from moefoundry.verify.ranks import RankError, World
from moefoundry.verify.round_trip import random_model, save
from moefoundry.verify.steps import rows_at_once
from moefoundry.verify.twin import ROWS, Twin

SHARED = MeshConfig(1, 2, 2)
"""Two ranks that share the experts: each tensor is sharded, or sharded otherwise."""
COMPARED = ("loss/train/", "grad_norm", "lr", "moe/")
"""Metrics that two runs of the same bits have in common; the others are times and sizes."""
POLL_SECONDS = 0.005


def prepared(twin: Twin) -> None:
    """Make what the twin's runs read: data, and the base of adapters."""
    with World(_prepare, twin.recipe, ranks=1, room=twin.room) as world:
        world.results()


def _prepare(recipe: Recipe) -> None:
    make_data(recipe)
    if recipe.load_path is not None and not (base := Path(recipe.load_path)).exists():
        save(random_model(recipe.model), base, recipe.max_seq_len)


def recipe_of_run(twin: Twin, name: str, mesh: MeshConfig, ranks: int = 2, **changes: Any) -> Recipe:
    """Give the recipe of a run in a directory of its own, on a mesh of so many ranks."""
    rows = rows_at_once(twin.recipe, ranks, most=ROWS // 2)
    run = {"run_name": name, "run_dir": str(twin.room / name), "device_train_microbatch_size": rows}
    return replace(twin.recipe, **{**run, "mesh": mesh, **changes})


def run(twin: Twin, recipe: Recipe, ranks: int = 2) -> str:
    """Train to the end; give what rank 0 printed."""
    with World(train_quietly, recipe, ranks=ranks, room=twin.room, gpu=twin.gpu) as world:
        world.results()
        return world.text()


def train_quietly(recipe: Recipe) -> None:
    """Train, and return nothing that would have to be sent."""
    train(recipe)


def wait_for_batch(world: World, run_dir: Path, batch: int, seconds: float = 60.0) -> None:
    """Wait until a run has finished a batch.

    Raises:
        RankError: It ended, or took too long.
    """
    deadline = time.monotonic() + seconds
    while last_batch(run_dir) < batch:
        if not world.alive():
            world.results()
            raise RankError(f"the run ended before batch {batch}")
        if time.monotonic() > deadline:
            raise RankError(f"batch {batch} did not come in {seconds:.0f} seconds")
        time.sleep(POLL_SECONDS)


def last_batch(run_dir: Path) -> int:
    """Give the newest batch that a run has written down; 0 without any."""
    if not (run_dir / FILE_NAME).exists():
        return 0
    return max((line["batch"] for line in read_metrics(run_dir)), default=0)


def metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Map each batch of a run to what it computed."""
    return {
        line["batch"]: {name: value for name, value in line.items() if name.startswith(COMPARED)}
        for line in read_metrics(run_dir)
    }


def first_difference(
    got: Mapping[int, Mapping[str, Any]], expected: Mapping[int, Mapping[str, Any]], bound: float = 0.0
) -> tuple[str, float]:
    """Compare batches.

    Args:
        got: What batches computed.
        expected: What they should have.
        bound: Largest relative difference of a number that is accepted; lists are compared if it is 0.

    Returns:
        The first difference in words, empty if there is none; and the largest relative one.
    """
    first, worst = "", 0.0
    for batch, values in expected.items():
        if batch not in got:
            return first or f"batch {batch} is missing", float("inf")
        for name, value in values.items():
            other = got[batch].get(name)
            if isinstance(value, list) or other is None:
                size = 0.0 if other == value or (other is not None and bound) else float("inf")
            else:
                size = abs(other - value) / max(abs(value), 1e-12)
            worst = max(worst, size)
            if not size <= bound and not first:
                first = f"batch {batch}: {name} is {other}, not {value}"
    return first, worst
