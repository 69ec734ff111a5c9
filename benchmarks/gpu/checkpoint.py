"""How long training stands still for a save in the background: the copy from the device to pinned memory.

A plain copy of as many bytes into pinned memory is the floor. While the save's thread writes, matrix products go on as
training would, and show what the save costs them.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.figures import Figures, Part
from benchmarks.gpu.steps import Options
from benchmarks.gpu.timing import timed
from moefoundry.checkpoint.manifest import Origin
from moefoundry.checkpoint.save import Saver
from moefoundry.checkpoint.store import CheckpointStore

STATE = {"recipe": {}, "weights_only": True}
ROWS, WIDTH = 64 * 1024, 1024  # 256 MiB of fp32


def run(figures: Figures, options: Options) -> None:
    """Save a state of 4 GiB three times."""
    figures.run("background save", measure, options)


def measure(part: Part, options: Options) -> None:
    """The stall of each save, the floor, and steps during a save beside steps without one."""
    tensors_count, rows, saves = (4, 64, 2) if options.tiny else (16, ROWS, 3)
    state = {f"model/{number}": torch.randn(rows, WIDTH, device=options.device) for number in range(tensors_count)}
    nbytes = sum(tensor.nbytes for tensor in state.values())
    part.put(bytes=nbytes, **floor(state, options))
    size = 64 if options.tiny else 4096
    x = torch.randn(size, size, device=options.device, dtype=torch.bfloat16)

    def step() -> float:
        start = time.perf_counter()
        for _ in range(10):
            x @ x
        _wait(options)
        return 1e3 * (time.perf_counter() - start)

    calm = [step() for _ in range(12)][2:]
    stalls, busy, seconds = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        saver = Saver(CheckpointStore(Path(scratch)), lambda checkpoint: None)
        for number in range(saves):
            _wait(options)
            start = time.perf_counter()
            saver.start(number, state, STATE, Origin(number))
            stalls.append(round(time.perf_counter() - start, 4))
            while saver.is_writing:
                busy.append(step())
            saver.finish()
            seconds.append(round(time.perf_counter() - start, 3))
            shutil.rmtree(saver.store.path(number - 1), ignore_errors=True)
            part.put(stall_seconds=stalls, save_seconds=seconds)
    part.put(
        stall_after_the_first=statistics.median(stalls[1:]),
        stall_gb_per_second=round(nbytes / 1e9 / statistics.median(stalls[1:]), 2),
        step_ms=round(statistics.median(calm), 3),
        step_ms_during_a_save=round(statistics.median(busy), 3) if busy else None,
    )


def floor(state: dict[str, Tensor], options: Options) -> dict[str, float]:
    """Seconds and GB/s of plain copies of the state into pinned memory."""
    cuda = options.device == "cuda"
    targets = [torch.empty(tensor.shape, pin_memory=cuda) for tensor in state.values()]

    def copy() -> None:
        for target, source in zip(targets, state.values(), strict=True):
            target.copy_(source, non_blocking=True)

    seconds = timed(copy, options.device)["ms"] / 1e3
    nbytes = sum(target.nbytes for target in targets)
    return {"floor_seconds": round(seconds, 4), "floor_gb_per_second": round(nbytes / 1e9 / seconds, 2)}


def _wait(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()
