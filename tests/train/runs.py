"""Run a recipe on forked ranks, and look at what it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moefoundry.config import Recipe
from tests.distributed import captured_output, run_distributed

LOSSES = ("loss/train/total", "loss/train/lm", "loss/train/balance", "loss/train/z")


class Run(NamedTuple):
    """A finished run: ``metrics.jsonl``, and what rank 0 printed."""

    run_dir: Path
    metrics: list[dict[str, Any]]
    out: str
    err: str

    def column(self, key: str) -> dict[int, Any]:
        """Batch -> value, for the batches that have one."""
        return {line["batch"]: line[key] for line in self.metrics if key in line}

    def exact(self, first_batch: int = 1) -> dict[int, tuple[str, ...]]:
        """Batch -> every digit of what training computed, from ``first_batch`` on."""
        return {
            line["batch"]: tuple(line[key].hex() for key in (*LOSSES, "grad_norm", "lr"))
            for line in self.metrics
            if line["batch"] >= first_batch
        }

    def checkpoints(self) -> list[str]:
        """Names of the run's checkpoints, and of anything else that lies there."""
        return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())


def run_recipe(recipe: Recipe, world_size: int = 1, before: Callable[[], None] | None = None, **options: Any) -> Run:
    """Train ``recipe`` on ``world_size`` ranks.

    Args:
        recipe: What to train.
        world_size: Number of ranks.
        before: Called in every rank first; a function at the top level of a module.
        options: Of :func:`run_distributed`.
    """
    out, err = run_distributed(_train, world_size, recipe, before, **options)[0]
    return finished(Path(recipe.run_dir), out, err)


def finished(run_dir: Path, out: str = "", err: str = "") -> Run:
    """What lies in ``run_dir``."""
    import json

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    latest = {line["batch"]: line for line in lines}
    return Run(run_dir, [latest[batch] for batch in sorted(latest)], out, err)


def _train(recipe: Recipe, before: Callable[[], None] | None) -> list[str]:
    from moefoundry.trainer import train

    if before is not None:
        before()
    with captured_output() as texts:
        train(recipe)
    return texts
