"""INT4 weights of compressed-tensors (``pack-quantized``), as Kimi K2 Thinking is published, read as their products.

X.weight_packed  int32 [O, I / 8]  eight columns in each, the first in the lowest four bits, 8 added to each value
X.weight_scale   [O, I / G]        factor of each G columns of a row
X.weight_shape   int [2]           O and I
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
IN_ONE, BITS = 8, 4  # values of an int32, and their width
ZERO = 8


def take_int4(
    specs: dict[str, TensorSpec], read: Callable[[str], Tensor], dtype: torch.dtype
) -> tuple[set[str], list[str]]:
    """Put each weight in the place of the three tensors that hold it.

    Args:
        specs: Shapes and dtypes of what a directory stores, by name; changed here.
        read: Name -> the tensor.
        dtype: dtype in which the weights are read.

    Returns:
        The names of the weights, and a line for each that cannot be read.
    """
    found: set[str] = set()
    problems = []
    for stored in [name for name in specs if name.endswith(f"weight{PACKED}")]:
        name = stored.removesuffix(PACKED)
        packed, scale, shape = specs.pop(stored), specs.pop(name + SCALE, None), specs.pop(name + SHAPE, None)
        if scale is None or shape is None or shape.shape != (2,) or len(scale.shape) != 2:
            problems.append(f"{name}: weight_scale [O, groups] and weight_shape [2] must be beside weight_packed")
            continue
        rows, columns = (int(size) for size in read(name + SHAPE).nan_to_num(0))
        groups = scale.shape[-1]
        if (
            packed != ((rows, -(-columns // IN_ONE)), torch.int32)
            or scale.shape != (rows, groups)
            or columns % max(1, groups)
        ):
            problems.append(f"{name} ({rows}, {columns}) does not fit {packed.dtype} {packed.shape}, {scale.shape}")
        specs[name] = TensorSpec((rows, columns), dtype)
        found.add(name)
    return found, problems


def unpacked(packed: Any, scale: Any, shape: tuple[int, int], *ranges: tuple[int, int]) -> Tensor:
    """Compute a weight, or the part in ``ranges`` of its leading dims, in fp32.

    Args:
        packed: Slices of the values, as safetensors gives them.
        scale: Slices of the factors.
        shape: O and I.
        ranges: Rows, or rows and columns.
    """
    rows = slice(*ranges[0]) if ranges else slice(None)
    shifts = torch.arange(0, IN_ONE * BITS, BITS, dtype=torch.int32)
    values = ((packed[rows].unsqueeze(-1) >> shifts) & (2**BITS - 1)).flatten(1)[:, : shape[1]] - ZERO
    factors = scale[rows].float()
    products = (values.unflatten(1, (factors.shape[1], -1)) * factors.unsqueeze(-1)).flatten(1)
    return products[:, slice(*ranges[1])] if len(ranges) > 1 else products
