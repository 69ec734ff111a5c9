"""A run on this machine: composer and its ranks, in place of the command that launches them."""

from __future__ import annotations

from pathlib import Path

from moefoundry.config import Problem
from moefoundry.config.schema_launch import LaunchConfig
from moefoundry.launching.job import Job, Written

READS = frozenset(["nodes", "gpus_per_node", "ranks_per_node", "environment", "workdir"])
IGNORES = frozenset(vars(LaunchConfig())) - READS


def local(job: Job) -> Written:
    """Write no file besides the recipe."""
    problems = []
    if job.launch.nodes > 1:
        problems.append(Problem("launch.nodes", f"{job.launch.nodes}, but local is one machine", allowed="1"))
    start = launcher(job.ranks_per_node, Path(job.python))
    return Written({}, [*start, "-m", "moefoundry", "train", job.recipe_path], problems)


def launcher(ranks: int, python: Path) -> list[str]:
    """Begin a command that starts a Python program on this machine: composer beside the interpreter, or that alone."""
    return [str(python.parent / "composer"), "-n", str(ranks)] if ranks > 1 else [str(python)]
