"""What the moving average of the parameters adds to a training step of the quickstart.

Two trainers of the same recipe, one with ``ema`` and one without, each in a process of its own that stays alive, take
turns of a few batches. A turn's time covers everything in the training loop; the thread that averages has whatever
core is free.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.harness import ROOT, Comparison
from benchmarks.processes import NODE, Channel, accept, failure, listen, running
from benchmarks.worker import NEVER, PACKED, RECIPE, train_moefoundry, turnstile
from moefoundry.config import load_recipe

SIDES = {"with": "ema={decay: 0.999}", "without": "ema=null"}
TARGET = 0.97
WARMUP_BATCHES = 3


def compare(threads: int, rounds: int = 11, batches: int = 6, quick: bool = False) -> list[Comparison]:
    """Seconds a step, with the average and without.

    Args:
        threads: Of each side; the average's own thread comes on top.
        rounds, batches: Turns of each side, and batches of a turn.
        quick: Two rounds of one batch.
    """
    if quick:
        rounds, batches = 2, 1
    turns = [WARMUP_BATCHES] + [batches] * rounds
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {side: stack.enter_context(worker(side, directory, 1 + sum(turns), threads)) for side in SIDES}
        for channel in workers.values():
            channel.receive()
        for turn in turns:
            for side, channel in workers.items():
                channel.send(turn)
                seconds[side].append(channel.receive()["seconds"] / turn)
        for channel in workers.values():
            channel.send(0)
    return [
        Comparison(
            benchmark="moving average",
            case=f"a step of the quickstart; {threads} thread{'s' if threads > 1 else ''}",
            unit="s",
            peer="moefoundry without ema",
            ours=seconds["with"][1:],
            theirs=seconds["without"][1:],
            target=TARGET,
        )
    ]


@contextmanager
def worker(side: str, directory: Path, batches: int, threads: int) -> Iterator[Channel]:
    """A training process and the channel to it."""
    address, log = str(directory / side), directory / f"{side}.log"
    command = [sys.executable, "-m", "benchmarks.ema", side, address, str(batches)]
    env = os.environ | NODE | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    with listen(address) as server, running(command, env, log, cwd=ROOT.parent, patience=20) as process:
        channel = accept(server, process, log)
        try:
            yield channel
        except EOFError:
            raise failure(process, log) from None


def main(side: str, address: str, batches: int) -> None:
    """Train one side, a turn at a time."""
    with tempfile.TemporaryDirectory() as run_dir:
        overrides = [
            PACKED,
            SIDES[side],
            f"max_duration={batches}ba",
            "scheduler.t_warmup=1ba",
            "scheduler.timing=composer",
            f"run_dir={run_dir}",
            f"save_interval={NEVER}",
            "eval_loader=null",
            "callbacks.report=null",
            "progress_bar=false",
            "log_to_console=false",
        ]
        train_moefoundry(load_recipe(RECIPE, overrides, world_size=1), turnstile(address))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
