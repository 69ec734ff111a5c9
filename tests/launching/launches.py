"""Launches of a small recipe, and programs that stand in for a scheduler's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from moefoundry.config import load_recipe
from moefoundry.launching.launch import Launch, make_launch, world_size
from tests.conftest import QUICK

MOUNTED = (
    "run_dir=/data/runs/x",
    "launch.image=registry/image:1",
    "launch.mounts=[claim:/data]",
    "launch.gpu_type=H100",
)


def launch_on(scheduler: str, output: Path, *changes: str) -> Launch:
    """The launch of the quickstart's model on machines without GPUs, but for the changes."""
    overrides = [*QUICK, "autoresume=true", "launch.gpus_per_node=0", *changes]
    ranks = world_size(load_recipe(None, overrides).launch)
    recipe = load_recipe(None, overrides, world_size=ranks)
    return make_launch(recipe, scheduler, ("recipe.yaml", *changes), output)


def programs(directory: Path, **texts: str) -> dict[str, str]:
    """Environment in which commands of these names are the given shell texts."""
    directory.mkdir()
    for name, text in texts.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "PYTHON": sys.executable}


def started(script: str, environment: dict[str, str], directory: Path) -> subprocess.Popen[str]:
    """A shell that runs a script."""
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", "-c", script], env=environment, cwd=directory, text=True, stdout=pipe, stderr=pipe)
