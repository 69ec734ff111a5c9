"""Splitting fp32 into bfloat16 parts as one Triton kernel, for ``ops/wide_linear.py``: every value is read once."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefoundry.ops.adamw_kernel import rounded, to_nearest

BLOCK = 2048


def stack_parts_triton(x: Tensor, number: int, dim: int) -> Tensor:
    """Compute ``stack_parts`` of a matrix in fp32."""
    rows, columns = x.shape
    shape = (number * rows, columns) if dim == 0 else (rows, number * columns)
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    part_stride, row_stride = (rows * columns, columns) if dim == 0 else (columns, number * columns)
    if x.numel():
        size = x.numel()
        split[(triton.cdiv(size, BLOCK),)](
            x.contiguous(), out, size, columns, row_stride, part_stride, NUMBER=number, SIZE=BLOCK, num_warps=4
        )
    return out


@triton.jit
def split(x, out, size, columns, row_stride, part_stride, NUMBER: tl.constexpr, SIZE: tl.constexpr):
    """Write the parts of ``SIZE`` values: rest, low, high, and high and low again as ``NUMBER`` says."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    place = first + tl.arange(0, SIZE)
    inside = place < size
    value = tl.load(x + place, mask=inside, other=0.0)
    high = rounded(value, to_nearest(value))
    value -= high.to(tl.float32)
    low = rounded(value, to_nearest(value))
    value -= low.to(tl.float32)
    rest = rounded(value, to_nearest(value))
    target = out + place // columns * row_stride + place % columns
    tl.store(target, rest, mask=inside)
    tl.store(target + part_stride, low, mask=inside)
    tl.store(target + 2 * part_stride, high, mask=inside)
    if NUMBER > 3:
        tl.store(target + 3 * part_stride, high, mask=inside)
    if NUMBER > 4:
        tl.store(target + 4 * part_stride, low, mask=inside)
