"""Weights in MXFP4 (OCP Microscaling Formats 1.0, section 5.2), as gpt-oss publishes its experts.

    NAME_blocks  uint8 [E, O, G, 16]   two E2M1 values a byte, the lower bits first, in G blocks of 32 along the input
    NAME_scales  uint8 [E, O, G]       exponent of each block's factor, a power of 2, plus 127

The weight NAME is [E, I, O], I = 32 G: transformers multiplies rows by it from the right. Every value is exact in BF16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.config import UserError
from moefoundry.config.errors import first_few

BLOCKS, SCALES = "_blocks", "_scales"
BYTES, VALUES = 16, 32  # of a block
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Compute the values, [E, O, G, 16] and [E, O, G] -> fp32 [E, I, O]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.ldexp(table[codes.int()], (scales.int() - BIAS).unsqueeze(-1))
    return values.flatten(-2).transpose(1, 2)


def take_packed(specs: dict[str, TensorSpec], dtype: torch.dtype, where: object) -> set[str]:
    """Replace blocks and scales in ``specs`` by the weights that they are, and return the weights' names.

    Args:
        specs: Tensors of the files by name.
        dtype: dtype in which the weights are read.
        where: The directory, for the error.

    Raises:
        UserError: Names tensors of which the other half is missing or has another shape.
    """
    names = {name.removesuffix(BLOCKS) for name, spec in specs.items() if _is_packed(name, spec)}
    if problems := [text for name in sorted(names) if (text := _problem(name, specs))]:
        raise UserError(f"{where}: MXFP4 tensors that cannot be read:\n  " + first_few(problems, "\n  "))
    for name in names:
        experts, outputs, groups, _ = specs.pop(name + BLOCKS).shape
        del specs[name + SCALES]
        specs[name] = TensorSpec((experts, groups * VALUES, outputs), dtype)
    return names


def _is_packed(name: str, spec: TensorSpec) -> bool:
    return name.endswith(BLOCKS) and spec.dtype == torch.uint8


def _problem(name: str, specs: Mapping[str, TensorSpec]) -> str:
    shape, scales = specs[name + BLOCKS].shape, specs.get(name + SCALES)
    if len(shape) != 4 or shape[-1] != BYTES:
        return f"{name}{BLOCKS} has the shape {shape}, not [experts, outputs, groups, {BYTES}]"
    if scales is None or scales != TensorSpec(shape[:3], torch.uint8):
        has = "no" if scales is None else f"a {scales.dtype} {scales.shape}"
        return f"{name}{BLOCKS} {shape} has {has} {name.rpartition('.')[2]}{SCALES}; uint8 {shape[:3]} is needed"
    return ""
