"""Mixture backends that were measured to be fastest on a GPU: what ``model.moe.backend: auto`` takes there.

``fastest.json`` beside this file has one entry for each layer that was measured, forward and backward, with its times;
``python -m benchmarks.gpu`` writes such a file. It is empty: no GPU has been measured yet.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """One measured layer.

    Attributes:
        device: Name of the GPU, as its driver gives it.
        dtype: Of the products: ``bfloat16``.
        d_model: D.
        expert_hidden_size: F.
        rows: Rows of an expert, on average.
        ms: Milliseconds of both passes, by backend.
    """

    device: str
    dtype: str
    d_model: int
    expert_hidden_size: int
    rows: float
    ms: dict[str, float]

    def distance(self, d_model: int, expert_hidden_size: int, rows: float) -> float:
        """Add up by how many powers of two the sizes differ."""
        ours, theirs = (self.d_model, self.expert_hidden_size, self.rows), (d_model, expert_hidden_size, rows)
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(ours, theirs, strict=True))


@cache
def measured_layers() -> tuple[Measured, ...]:
    """Read the table."""
    entries: list[dict[str, Any]] = json.loads((files("moefoundry.moe") / "fastest.json").read_text())
    return tuple(Measured(**entry) for entry in entries)


def backends_by_speed(device: str, dtype: str, d_model: int, expert_hidden_size: int, rows: float) -> list[str]:
    """Name the backends that were measured at the nearest size, the fastest first; none for another device or dtype.

    Args:
        device: Name of the GPU.
        dtype: Dtype of the products, without ``torch.``.
        d_model: D.
        expert_hidden_size: F.
        rows: Rows of an expert, on average.
    """
    layers = [layer for layer in measured_layers() if (layer.device, layer.dtype) == (device, dtype)]
    if not layers:
        return []
    ms = min(layers, key=lambda layer: layer.distance(d_model, expert_hidden_size, rows)).ms
    return sorted(ms, key=lambda backend: ms[backend])
