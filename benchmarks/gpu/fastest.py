"""Entries of ``moefoundry/moe/fastest.json`` from the figures of the step ``layer``."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from benchmarks.gpu.routers import ROUTERS
from moefoundry.moe.fastest import Measured, measured_layers

PART = re.compile(r"T(\d+) D(\d+) F(\d+) E(\d+) K(\d+), (\w+) router, (\w+), bf16")
"""Names of parts that are layers in BF16 (:class:`~benchmarks.gpu.layer.Case`)."""


def fastest(record: dict[str, Any]) -> list[dict[str, Any]]:
    """List what was measured, and what the package has of other devices.

    A backend's time is the mean over all routers; one that lacks a router, or was wrong with one, is left out.
    """
    device = record.get("versions", {}).get("device", "")
    times: dict[tuple[int, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, figures in record["steps"].get("layer", {}).get("parts", {}).items():
        found = PART.fullmatch(name)
        if found and figures["state"] == "done" and "wrong" not in figures:
            *sizes, _, backend = found.groups()
            times[tuple(map(int, sizes))][backend].append(figures["both"]["ms"])
    ours = []
    for (tokens, d_model, hidden, experts, top_k), of_backend in times.items():
        ms = {name: round(sum(all_) / len(all_), 4) for name, all_ in of_backend.items() if len(all_) == len(ROUTERS)}
        if ms:
            ours.append(Measured(device, "bfloat16", d_model, hidden, tokens * top_k / experts, ms))
    return [entry._asdict() for entry in (*(other for other in measured_layers() if other.device != device), *ours)]
