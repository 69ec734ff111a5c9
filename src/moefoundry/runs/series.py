"""Metrics of a run over its batches, in bins, so that a plot of a long run has as many points as one can see.

A bin has the mean, the least and the most of its values, so no spike is lost. Only the bins are kept in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moefoundry.runs.metrics import FILE_NAME, LOAD_PREFIX, Line, last_line, read_lines

MAX_BINS = 400
MAX_TIMES = 120  # bins of the loads of experts


@dataclass
class Curve:
    """One metric; lists are parallel, a bin each, and bins without a finite value are left out.

    Attributes:
        batches: Mean batch.
        means, lows, highs: Of the values.
        last: Last value as it was measured, finite or not.
        last_batch: Its batch.
        not_finite: Number of values that are not.
    """

    batches: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    last: float = math.nan
    last_batch: int = 0
    not_finite: int = 0
    _count: int = 0
    _bin: int = -1

    def add(self, number: int, batch: int, value: float) -> None:
        """Add a value to the bin of this number; numbers ascend."""
        self.last, self.last_batch = value, batch
        if not math.isfinite(value):
            self.not_finite += 1
            return
        if number != self._bin:
            self._bin, self._count = number, 0
            for values in (self.batches, self.means, self.lows, self.highs):
                values.append(0.0)
            self.lows[-1] = self.highs[-1] = value
        self._count += 1
        self.batches[-1] += (batch - self.batches[-1]) / self._count
        self.means[-1] += (value - self.means[-1]) / self._count
        self.lows[-1], self.highs[-1] = min(self.lows[-1], value), max(self.highs[-1], value)


@dataclass
class Load:
    """Load of the experts of a layer, as multiples of the uniform load, in bins of batches.

    Attributes:
        edges: First batch of each bin.
        values: A list of E means for each bin.
    """

    edges: list[int] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    _count: int = 0
    _bin: int = -1

    def add(self, number: int, batch: int, shares: list[float]) -> None:
        """Add the shares of a batch."""
        if number != self._bin:
            self._bin, self._count = number, 0
            self.edges.append(batch)
            self.values.append([0.0] * len(shares))
        self._count += 1
        means = self.values[-1]
        for expert, share in enumerate(shares):
            means[expert] += (share * len(shares) - means[expert]) / self._count


@dataclass
class Series:
    """All metrics of a run.

    Attributes:
        curves: By name.
        loads: By name of the layer.
        batches: Number of the last batch.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    loads: dict[str, Load] = field(default_factory=dict)
    batches: int = 0

    def of(self, *names: str) -> dict[str, Curve]:
        """Give those of these metrics that there are."""
        return {name: self.curves[name] for name in names if name in self.curves}

    def under(self, prefix: str) -> dict[str, Curve]:
        """Give the metrics whose names begin with a prefix, without it."""
        return {name.removeprefix(prefix): curve for name, curve in self.curves.items() if name.startswith(prefix)}


def read_series(run_dir: Path) -> Series:
    """Read the metrics of a run; empty if it has none."""
    if not (run_dir / FILE_NAME).exists():
        return Series()
    last = last_line(run_dir)
    return series_of(read_lines(run_dir), last["batch"] if last else 0)


def series_of(lines: Iterable[Line], batches: int) -> Series:
    """Collect lines of ascending batches; of batches that come again, in files of earlier releases, all values count.

    Args:
        lines: Lines of metrics.
        batches: Last batch, by which bins are made.
    """
    series = Series(batches=batches)
    width, load_width = math.ceil(max(batches, 1) / MAX_BINS), math.ceil(max(batches, 1) / MAX_TIMES)
    for line in lines:
        batch = line["batch"]
        for name, value in line.items():
            if name == "batch":
                continue
            if isinstance(value, (int, float)):
                series.curves.setdefault(name, Curve()).add((batch - 1) // width, batch, float(value))
            elif name.startswith(LOAD_PREFIX):
                load = series.loads.setdefault(name.removeprefix(LOAD_PREFIX), Load())
                load.add((batch - 1) // load_width, batch, value)
    return series
