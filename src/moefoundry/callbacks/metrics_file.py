"""``run_dir/metrics.jsonl``: one JSON object for every batch, with full float precision.

    batch                                   1-based
    loss/train/{total,lm,balance,z,mtp,indexer}   means over the tokens of the global batch, nats; total is the sum
    grad_norm                               before clipping
    lr                                      learning rate
    data/wait_seconds                       until every rank had its batch
    data/padding                            share of positions without a token, where rows may have such
    curriculum/{stage,max_seq_len,global_train_batch_size}   with a curriculum; stages count from 1
    tokens/SOURCE, loss/train/source/SOURCE with several streams: tokens from the beginning on, and mean loss
    throughput/tokens_per_sec               all ranks
    throughput/device/mfu                   model FLOPs a second / the device's peak, on known GPUs in BF16 or FP8
    moe/{max_violation,router_entropy,dropped_fraction,expert_bias_max_abs}
    indexer/kl                              mean over tokens and layers, nats, where indexers learn
    moe/load/layer{i}                       list of E shares
    metrics/eval/LanguageCrossEntropy       nats a token, in the batches after which the model was evaluated
    metrics/LABEL/N-shot/METRIC             in the same batches, of each of the recipe's icl_tasks
    icl/metrics/eval_gauntlet/NAME          their averages
    resume/{store,exchange,optimizer,data_position}_seconds   in the first batch after a resume, rank 0
    checkpoint/stall_seconds                in the batches after which a checkpoint was written
    memory/peak_host_gib, memory/peak_device_gib
    skipped_steps                           1 in the batches whose step was skipped (``nonfinite: skip``)

and every other number that a callback logs, but under these names. A key is absent where it does not apply. A line is
appended and flushed as its batch ends, so a killed run keeps it. An evaluation after the last batch completes that
batch's line. Lines of batches that are trained again, or that another run has left here, move to
``metrics.superseded.jsonl`` when training begins, so that there is one line a batch. (Of files of earlier releases
the later line of a batch counts: :func:`moefoundry.runs.metrics.read_metrics`.)
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from torch import Tensor

from moefoundry.runs.metrics import FILE_NAME

SUPERSEDED = "metrics.superseded.jsonl"
LEFT_OUT_PREFIXES = ("time/", "trainer/")
"""Counters that Composer logs of its own accord, and that follow from the number of the batch."""

OWN_PACKAGES = ("moefoundry", "composer", "llmfoundry")
"""Packages whose callbacks agree on the names of metrics."""

ESTIMATE = "time/remaining_estimate"  # of Composer's runtime_estimator


class MetricsFile(LoggerDestination):
    """Writes ``metrics.jsonl`` from rank 0.

    Args:
        run_dir: Directory of the file; it must exist.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        self._pending: dict[str, Any] = {}
        self._own: set[str] = {"batch"}  # keys that have been written, but for those of packages' parts
        self._of_packages: dict[str, tuple[Any, str]] = {}  # values, and the classes that log them
        self._logging = ""  # the class of a package that logs now
        self._refused: set[str] = set()
        self._written: dict[str, Any] = {}
        self._begin = 0  # of the last line, in bytes

    def begin(self, after: int) -> None:
        """Set aside the lines of batches beyond ``after``: they are trained again, or are another run's."""
        if dist.get_global_rank() == 0 and self.path.exists():
            set_aside(self.path, after)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
            if number and (name == ESTIMATE or not name.startswith(LEFT_OUT_PREFIXES)):
                value = value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
                if self._logging:
                    self._of_packages[name] = value, self._logging
                else:
                    self._pending[name] = value

    def init(self, state: State, logger: Logger) -> None:
        """Note from now on what callbacks and algorithms of packages log."""
        for part in [*state.callbacks, *state.algorithms]:
            if type(part).__module__.partition(".")[0] not in OWN_PACKAGES:
                method = "run_event" if isinstance(part, Callback) else "apply"
                setattr(part, method, self._noting(type(part).__name__, getattr(part, method)))

    def _noting(self, name: str, run: Callable[[Event, State, Logger], Any]) -> Callable[[Event, State, Logger], Any]:
        def noted(event: Event, state: State, logger: Logger) -> Any:
            self._logging = name
            try:
                return run(event, state, logger)
            finally:
                self._logging = ""

        return noted

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Take vectors, which only this file can hold (Composer's other destinations want scalars)."""
        self._pending.update(metrics)

    def values(self, names: Sequence[str]) -> dict[str, float]:
        """Give those of these metrics that have been measured since the last line."""
        return read_together({name: self._pending[name] for name in names if name in self._pending})

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Write the line of a batch, at its last event: after evaluation and after the save, as loggers run last."""
        if dist.get_global_rank() == 0 and self.path.exists():
            self._begin = self.path.stat().st_size
        self._write({"batch": state.timestamp.batch.value, **self._measured()})

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Complete the last batch's line: an evaluation at the end of training comes after it."""
        if self._written.get("batch") == state.timestamp.batch.value:
            self._write({**self._written, **self._measured()})

    def _measured(self) -> dict[str, Any]:
        """Read what was logged since the last line; of equal keys, those of packages are left out, with a warning."""
        self._own |= self._pending.keys()
        taken = self._of_packages.keys() & self._own
        for name in sorted(taken - self._refused) if dist.get_global_rank() == 0 else ():
            other = f"{self._of_packages[name][1]} logs {name}, a key that {FILE_NAME} has already"
            print(f"warning: {other}: it is left out; log it under another name", file=sys.stderr, flush=True)
        self._refused |= taken
        further = {name: value for name, (value, _) in self._of_packages.items() if name not in taken}
        self._of_packages = {}
        return read_together({**further, **self._pending})

    def _write(self, line: dict[str, Any]) -> None:
        self._written, self._pending = line, {}
        if dist.get_global_rank() == 0:
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.seek(self._begin)
                file.write(json.dumps(line).encode() + b"\n")
                file.truncate()


def read_together(metrics: dict[str, Any]) -> dict[str, Any]:
    """Turn tensors into numbers and lists, for which the host waits once for each device."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    read: dict[str, Any] = {}
    for device in {value.device for value in tensors.values()}:
        own = {name: value for name, value in tensors.items() if value.device == device}
        numbers = iter(torch.cat([value.double().flatten() for value in own.values()]).tolist())
        for name, value in own.items():
            read[name] = [next(numbers) for _ in range(value.numel())] if value.dim() else next(numbers)
    return {name: read.get(name, value) for name, value in metrics.items()}


def set_aside(path: Path, after: int) -> None:
    """Move the lines of batches beyond ``after`` to :data:`SUPERSEDED`, and the half line that a killed run left."""
    kept: list[bytes] = []
    superseded: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        (kept if line.endswith(b"\n") and _batch(line) <= after else superseded).append(line)
    if superseded:
        with path.with_name(SUPERSEDED).open("ab") as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for line in superseded)
        fresh = path.with_name(f".{path.name}")
        fresh.write_bytes(b"".join(kept))
        fresh.replace(path)


def _batch(line: bytes) -> float:
    """Read the batch of a line; infinity if it is not a line of metrics."""
    try:
        return float(json.loads(line)["batch"])
    except (ValueError, TypeError, KeyError):
        return math.inf
