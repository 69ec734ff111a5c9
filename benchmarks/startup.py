"""Seconds from the command to the end of the first optimizer step, two ranks, cold processes.

moefoundry runs its quickstart as it is (``composer -n 2 scripts/train.py configs/quickstart.yaml``; only the run
directory is changed); LLM Foundry runs what its repository has as ``scripts/train/train.py``, on the model and training
of ``llm_foundry.py``. Both through Composer's launcher and through torchrun, in turn. Data are prepared beforehand.

The end of the first step is when a file appears: of moefoundry the first line of ``metrics.jsonl``, written by rank 0
as the last thing of a batch; of LLM Foundry a file that a callback makes at ``batch_end``, an earlier moment of the
batch, loaded through the configuration's own ``code_paths``. Then the launcher is told to end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import ROOT, Comparison
from benchmarks.llm_foundry import matches, training_config
from benchmarks.processes import NODE, failure, running
from benchmarks.worker import PACKED, RECIPE
from moefoundry.config import load_recipe

RANKS = 2
TARGET = 1.25  # at most 0.8 of LLM Foundry's time
POLL_SECONDS = 0.02
ENTRY = """import sys
from llmfoundry.command_utils import train_from_yaml

train_from_yaml(sys.argv[1], sys.argv[2:])
"""
PLUGIN = """from pathlib import Path

from benchmarks.llm_foundry import register_fused_adamw
from composer.core import Callback
from llmfoundry.registry import callbacks

register_fused_adamw()


class FirstStep(Callback):
    def batch_end(self, state, logger):
        Path({marker!r}).touch()


callbacks.register("first_step", func=FirstStep)
"""
LAUNCHERS: dict[str, tuple[list[str], float | None]] = {
    "composer": (["-m", "composer.cli", "-n", str(RANKS)], TARGET),
    "torchrun": (["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)], None),
}


def compare(threads: int, rounds: int = 3, quick: bool = False) -> list[Comparison]:
    """Measure both sides with both launchers.

    Args:
        threads: Of each side, over its ranks.
        rounds: Starts of each side and launcher.
        quick: One start of each side, through Composer's launcher.
    """
    launchers = ["composer"] if quick else list(LAUNCHERS)
    seconds: dict[str, dict[str, list[float]]] = {name: {"ours": [], "theirs": []} for name in launchers}
    for _ in range(1 if quick else rounds):
        for launcher in launchers:
            for side, prepare in (("ours", moefoundry_script), ("theirs", llm_foundry_script)):
                seconds[launcher][side].append(first_step(launcher, prepare, threads // RANKS))
    return [
        Comparison(
            benchmark="start-up",
            case=f"command to first optimizer step, {launcher}, {RANKS} ranks",
            unit="s",
            peer="LLM Foundry",
            ours=seconds[launcher]["ours"],
            theirs=seconds[launcher]["theirs"],
            target=LAUNCHERS[launcher][1],
        )
        for launcher in launchers
    ]


def first_step(launcher: str, prepare: Callable[[Path], tuple[list[str], Path]], threads: int) -> float:
    """Start one side once and wait for its first step."""
    with tempfile.TemporaryDirectory() as name:
        script, marker = prepare(Path(name))
        command = [sys.executable, *LAUNCHERS[launcher][0], *script]
        env = (
            os.environ
            | NODE
            | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT.parent)}
        )
        log = Path(name) / "log"
        start = time.perf_counter()
        with running(command, env, log, cwd=ROOT.parent) as process:
            while not marker.exists() or (marker.suffix == ".jsonl" and not marker.stat().st_size):
                if process.poll() is not None:
                    raise failure(process, log)
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - start


def moefoundry_script(directory: Path) -> tuple[list[str], Path]:
    """The quickstart's command line after the launcher, and the file to wait for."""
    run_dir = directory / "run"
    return ["scripts/train.py", str(RECIPE), PACKED, f"run_dir={run_dir}"], run_dir / "metrics.jsonl"


def llm_foundry_script(directory: Path) -> tuple[list[str], Path]:
    """LLM Foundry's command line after the launcher, and the file to wait for."""
    recipe = load_recipe(RECIPE, [PACKED], world_size=RANKS)
    entry, plugin, yaml, marker = (directory / name for name in ("train.py", "plugin.py", "train.yaml", "first_step"))
    entry.write_text(ENTRY)
    plugin.write_text(PLUGIN.format(marker=str(marker)))
    config = training_config(recipe, matches(recipe.model)[0])
    config["callbacks"]["first_step"] = {}
    yaml.write_text(json.dumps(config | {"code_paths": [str(plugin)]}))  # JSON is YAML
    return [str(entry), str(yaml)], marker
