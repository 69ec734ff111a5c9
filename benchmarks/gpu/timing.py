"""Time, memory, host syncs and kernels of calls on a device; on a CPU, time alone."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

SECONDS = 0.4
"""How long a figure is measured, about."""
FEWEST, MOST = 5, 50
SYNC_WARNING = "synchronizing CUDA operation"


def timed(calls: Callable[[], Any] | Sequence[Callable[[], Any]], device: str, seconds: float = SECONDS) -> dict:
    """Milliseconds a call takes, every one of them; calls that are given as several alternate.

    Several calls with inputs of their own keep one call's inputs from being in the cache for the next.

    Returns:
        ``ms``, the median; ``p20`` and ``p80``; ``runs_ms``, all; ``host_ms``, the median time to issue a call: where
        it is near ``ms``, the device waits for the host.
    """
    calls = [calls] if callable(calls) else list(calls)
    for call in calls:
        call()
    measure = _events if device == "cuda" else _wall
    first, _ = measure(calls, 2)
    number = min(MOST, max(FEWEST, int(seconds * 1e3 / max(statistics.median(first), 1e-3))))
    runs, host = measure(calls, number)
    low, high = (statistics.quantiles(runs, n=5)[at] for at in (0, 3))
    figures = {"ms": statistics.median(runs), "p20": low, "p80": high, "host_ms": statistics.median(host)}
    return {name: round(value, 4) for name, value in figures.items()} | {"runs_ms": [round(run, 4) for run in runs]}


def _events(calls: Sequence[Callable[[], Any]], number: int) -> tuple[list[float], list[float]]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    host = []
    torch.cuda.synchronize()
    for index, (before, after) in enumerate(pairs):
        start = time.perf_counter()
        before.record()
        calls[index % len(calls)]()
        after.record()
        host.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairs], host


def _wall(calls: Sequence[Callable[[], Any]], number: int) -> tuple[list[float], list[float]]:
    runs = []
    for index in range(number):
        start = time.perf_counter()
        calls[index % len(calls)]()
        runs.append(1e3 * (time.perf_counter() - start))
    return runs, runs


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The most memory that is allocated during a call, with what was allocated before."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def host_syncs(call: Callable[[], Any], device: str) -> dict[str, int] | None:
    """Where the host waited for the device during a call, and how often."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in seen:
        if SYNC_WARNING in str(warning.message):
            place = f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    return places


def largest_kernels(call: Callable[[], Any], device: str, number: int, calls: int = 1) -> dict[str, list[float]] | None:
    """Microseconds and count of the kernels that took longest, by name; ``all`` is their sum over all kernels.

    They are means over ``calls`` calls.
    """
    from torch.profiler import ProfilerActivity, profile

    if device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_device_time_total)
    times = {row.key[:120]: (row.self_device_time_total, row.count) for row in islice(rows, number)}
    total = sum(row.self_device_time_total for row in rows), sum(row.count for row in rows)
    return {name: [round(time / calls, 1), count / calls] for name, (time, count) in {"all": total, **times}.items()}


def timed_with_kernels(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """:func:`timed`, and the device's own time, ``device_us``: for calls that the host may take longer to issue."""
    kernels = largest_kernels(call, device, 25, calls=10)
    own = {} if kernels is None else {"device_us": kernels["all"][0], "kernels_us": kernels}
    return timed(call, device) | own


def tflops(operations: float, milliseconds: float) -> float:
    """TFLOP/s, rounded."""
    return round(operations / milliseconds / 1e9, 3 if milliseconds * 1e9 > operations else 1)
