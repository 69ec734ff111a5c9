"""Load of hosts and GPUs, in every tracker and in ``metrics.jsonl``, on the axis of all other metrics."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from moefoundry.config import Recipe, SystemMonitorConfig

HOST: dict[str, tuple[str, Callable[[], float]]] = {
    "host_percent": ("MEAN", lambda: psutil.cpu_percent(None)),
    "host_memory_percent": ("MAX", lambda: psutil.virtual_memory().percent),
}
GPU: dict[str, tuple[str, Callable[[], float]]] = {
    "gpu_percent": ("MEAN", torch.cuda.utilization),
    "gpu_memory_percent": ("MAX", lambda: _gpu_memory_percent(*torch.cuda.mem_get_info())),
    "gpu_watts": ("MEAN", lambda: torch.cuda.power_draw() / 1000),
    "gpu_celsius": ("MAX", torch.cuda.temperature),
}
"""Metrics: how the numbers of all ranks become one, and the number of this rank."""


class SystemMonitor(Callback):
    """Logs ``system/{host,gpu}_...`` of all ranks at the end of every few batches.

    ``host_percent`` is the load of all cores of a host since the last measurement, ``gpu_percent`` the share of time in
    which a kernel ran, in the driver's last sampling period: means over ranks. ``host_memory_percent``,
    ``gpu_memory_percent`` (both of what the machine has, whoever uses it) and ``gpu_celsius`` are of the rank that has
    most; ``gpu_watts`` is a mean.

    Raises:
        ImportError: There is a GPU, and not the package that asks its driver.
    """

    def __init__(self, cfg: SystemMonitorConfig, recipe: Recipe) -> None:
        self.every = cfg.every
        self.metrics = HOST | (GPU if torch.cuda.is_available() else {})
        for _, measure in self.metrics.values():
            measure()  # begins the first interval of a load, and finds what is missing

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.every:
            return
        values = torch.tensor([measure() for _, measure in self.metrics.values()], dtype=torch.float32)
        largest = state.device.tensor_to_device(values)
        total = largest.clone()
        dist.all_reduce(largest, reduce_operation="MAX")
        dist.all_reduce(total)
        of_kind = {"MAX": largest.tolist(), "MEAN": (total / dist.get_world_size()).tolist()}
        kinds = [kind for kind, _ in self.metrics.values()]
        logger.log_metrics(
            {f"system/{name}": of_kind[kind][i] for i, (name, kind) in enumerate(zip(self.metrics, kinds, strict=True))}
        )


def _gpu_memory_percent(free: int, total: int) -> float:
    return 100 * (1 - free / total)
