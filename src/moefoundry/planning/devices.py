"""Accelerators that estimates know, by their makers' data sheets, and files with numbers of one's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from moefoundry.config.errors import UserError
from moefoundry.config.files import read_tree


@dataclass(frozen=True)
class Accelerator:
    """Rates of one device, for dense operands.

    Attributes:
        memory_gb: Memory, 1e9 bytes.
        bf16_tflops: Peak of BF16 products, 1e12 FLOP/s.
        fp8_tflops: Peak of FP8 products; as ``bf16_tflops`` where there are none.
        memory_tb_per_s: Bandwidth of its memory, 1e12 bytes/s.
        link_gb_per_s: Bandwidth to devices that it is linked to (NVLink, Infinity Fabric), 1e9 bytes/s each way.
        network_gb_per_s: Its share of the bandwidth to all others, 1e9 bytes/s each way.
        linked_devices: Devices that the link joins, or as many of them as meshes use; a node, in the words of a plan.
    """

    memory_gb: float
    bf16_tflops: float
    fp8_tflops: float
    memory_tb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    linked_devices: int


ACCELERATORS = {
    "a100": Accelerator(80, 312, 312, 2.0, 300, 25, 8),
    "h100": Accelerator(80, 989, 1979, 3.35, 450, 50, 8),
    "h200": Accelerator(141, 989, 1979, 4.8, 450, 50, 8),
    "b200": Accelerator(180, 2250, 4500, 7.7, 900, 50, 8),
    "gb200": Accelerator(186, 2500, 5000, 8.0, 900, 50, 64),
    "mi300x": Accelerator(192, 1307, 2615, 5.3, 448, 50, 8),
}

MAX_RATE = 10**9
"""Largest number that a file may have; above what any device will be."""


def known_device(name: str) -> Accelerator | None:
    """Find an accelerator by what its driver calls it, as in ``NVIDIA H100 80GB HBM3``; None for others."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((ACCELERATORS[word] for word in words if word in ACCELERATORS), None)


def accelerator(name: str) -> Accelerator:
    """Find an accelerator by its name, or read it from a YAML file that has a number for each attribute.

    Raises:
        UserError: There is none of this name, and no such file; or the file cannot be read, or lacks a number.
    """
    if name.lower() in ACCELERATORS:
        return ACCELERATORS[name.lower()]
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--gpu {name}: unknown; known are {', '.join(ACCELERATORS)}, or a YAML file of its numbers")
    values = read_tree(file)
    _check(values, file)
    return Accelerator(**values)


def _check(values: Mapping[str, object], file: Path) -> None:
    """Refuse a file's numbers unless they are an accelerator's."""
    keys = [field.name for field in fields(Accelerator)]
    if wrong := sorted(values.keys() ^ set(keys)):
        raise UserError(f"{file}: {', '.join(map(str, wrong))}: the keys must be {', '.join(keys)}")
    for key, value in values.items():
        kinds = int if key == "linked_devices" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= MAX_RATE:
            number = "whole number" if kinds is int else "number"
            raise UserError(f"{file}: {key}: {value!r} is no {number} above 0 and up to {MAX_RATE:,}")
