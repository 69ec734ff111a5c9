"""Throughput and memory of all ranks, the share of a device's peak that is used, and the learning rate."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from moefoundry.config import Recipe, SpeedMonitorConfig

GIB = 2**30
DEVICE_RATE = "throughput/device/tokens_per_sec"


class SpeedMonitor(Callback):
    """Logs ``throughput/tokens_per_sec`` of all ranks and ``throughput/device/tokens_per_sec`` of one.

    Both are averaged over the last ``window_size`` batches, from the second batch on: the first one warms up. Time
    counts from the start of a batch to its end, so without evaluation and checkpoints.
    """

    def __init__(self, cfg: SpeedMonitorConfig, recipe: Recipe) -> None:
        self._seconds: deque[float] = deque(maxlen=cfg.window_size)
        self._tokens: deque[int] = deque(maxlen=cfg.window_size)
        self._start = 0.0
        self._warm = False

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._start = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self._warm:
            self._warm = True
            return
        assert state.previous_timestamp is not None, "set before every batch_end"
        self._seconds.append(time.perf_counter() - self._start)
        self._tokens.append(state.timestamp.token.value - state.previous_timestamp.token.value)
        rate = sum(self._tokens) / sum(self._seconds)
        logger.log_metrics({"throughput/tokens_per_sec": rate, DEVICE_RATE: rate / dist.get_world_size()})


class Utilization(Callback):
    """Logs ``throughput/device/mfu``, the model's FLOPs a second as a share of the device's peak.

    Args:
        flops_per_token: FLOPs of the model, forward and backward, without what is computed again.
        peak_flops: FLOPs a second of a device, in the format of the products.
        measured: Gives metrics of this batch by their names, those that there are.
    """

    def __init__(
        self, flops_per_token: float, peak_flops: float, measured: Callable[[Sequence[str]], dict[str, float]]
    ) -> None:
        self.share = flops_per_token / peak_flops
        self.measured = measured

    def batch_end(self, state: State, logger: Logger) -> None:
        for rate in self.measured((DEVICE_RATE,)).values():
            logger.log_metrics({"throughput/device/mfu": rate * self.share})


class MemoryMonitor(Callback):
    """Logs peaks of memory at the end of every batch.

    ``memory/peak_host_gib`` is resident memory, summed over ranks; ``memory/peak_device_gib``, on a GPU, is that of the
    rank that has most.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        peak_host = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB)
        peak_host = state.device.tensor_to_device(peak_host)
        dist.all_reduce(peak_host)
        metrics = {"memory/peak_host_gib": peak_host}
        if peak_host.is_cuda:
            peak_device = state.device.tensor_to_device(torch.tensor(torch.cuda.max_memory_allocated() / GIB))
            dist.all_reduce(peak_device, reduce_operation="MAX")
            metrics["memory/peak_device_gib"] = peak_device
        logger.log_metrics(metrics)


class LRMonitor(Callback):
    """Logs ``lr``, the learning rate that the batch was trained with."""

    def batch_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"lr": state.optimizers[0].param_groups[0]["lr"]})
