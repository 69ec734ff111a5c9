"""The three matrix products as Triton kernels for GPUs whose tensor cores take FP8.

Each step multiplies 128 elements of K on the tensor cores, from zero, and adds the result, times both scales, to a sum
in FP32 registers: the promotion of DeepSeek-V3 (section 3.3.2). The device finds the groups from their sizes; the grid
is an upper bound, and programs after the last group end at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefoundry.ops.fp8 import triton_codec as codec
from moefoundry.ops.fp8.formats import QuantizedTensor
from moefoundry.ops.fp8.groups import all_rows
from moefoundry.ops.fp8.triton_quantize import tuned

CONFIGS = [
    triton.Config({"M": m, "N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (128, 64, 4, 4), (64, 64, 4, 5))
]


def multiply_triton(
    x: QuantizedTensor, weight: QuantizedTensor, group_sizes_E: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.fprop`, or with the transposed weight :func:`moefoundry.ops.fp8.dgrad`."""
    (rows, inner), columns = x.shape, weight.shape[-2]
    out = torch.empty(rows, columns, dtype=dtype, device=x.values.device)
    if not out.numel():
        return out
    sizes_E = all_rows(rows, out.device) if group_sizes_E is None else group_sizes_E
    groups = len(sizes_E)
    weights, weight_scales = weight.values, weight.scales
    if group_sizes_E is None:
        weights, weight_scales = weights.unsqueeze(0), weight_scales.unsqueeze(0)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(columns, meta["N"]), (rows + groups * (meta["M"] - 1)) // meta["M"]

    _multiply[grid](
        x.values.contiguous(),
        x.scales.contiguous(),
        weights,
        weight_scales,
        out,
        sizes_E,
        inner,
        columns,
        groups,
        *weights.stride(),
        *weight_scales.stride(),
        MAX_GROUPS=triton.next_power_of_2(groups),
    )
    return out


def wgrad_triton(grad: QuantizedTensor, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.wgrad`."""
    rows, columns = grad.shape[1], x.shape[1]
    sizes_E = all_rows(x.shape[0], x.values.device) if x.group_sizes is None else x.group_sizes
    groups = len(sizes_E)
    out = torch.empty(groups, rows, columns, dtype=dtype, device=x.values.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(columns, meta["N"]), triton.cdiv(rows, meta["M"]), groups

    if out.numel():
        _wgrad[grid](
            grad.values,
            grad.scales,
            x.values,
            x.scales,
            out,
            sizes_E,
            rows,
            columns,
            x.values.shape[1],
            groups,
            MAX_GROUPS=triton.next_power_of_2(groups),
        )
    return out.squeeze(0) if x.group_sizes is None else out


@triton.autotune(tuned(CONFIGS), key=["inner", "columns"])
@triton.jit
def _multiply(
    x,
    x_scales,
    weights,
    weight_scales,
    out,
    group_sizes,
    inner,
    columns,
    num_groups,
    weight_group,
    weight_row,
    weight_column,
    scale_group,
    scale_row,
    scale_column,
    MAX_GROUPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Multiply with the strides, in elements, of ``weights`` [E, N, K] and scales: a transposed weight is a view."""
    group, first, end = codec.rows_of_tile(group_sizes, tl.program_id(1), num_groups, MAX_GROUPS, M)
    if first >= end:
        return
    row = (first + tl.arange(0, M)).to(tl.int64)
    column = tl.program_id(0) * N + tl.arange(0, N)
    k = tl.arange(0, codec.TILE)
    x_place = x + row[:, None] * inner + k[None, :]
    x_scale_place = x_scales + row * tl.cdiv(inner, codec.TILE)
    weight_place = weights + group.to(tl.int64) * weight_group
    weight_place += column[None, :].to(tl.int64) * weight_row + k[:, None] * weight_column
    weight_scale_place = weight_scales + group * scale_group + (tl.program_id(0) * N // codec.TILE) * scale_row
    row_inside, column_inside = row < end, column < columns
    total = tl.zeros([M, N], tl.float32)
    for step in range(tl.cdiv(inner, codec.TILE)):
        left = inner - step * codec.TILE
        a = tl.load(x_place, mask=row_inside[:, None] & (k[None, :] < left), other=0.0)
        b = tl.load(weight_place, mask=column_inside[None, :] & (k[:, None] < left), other=0.0)
        row_scales = codec.load_scales(x_scale_place + step, row_inside)
        block_scale = codec.load_scales(weight_scale_place + step * scale_column, True)
        total += tl.dot(a, b) * (row_scales * block_scale)[:, None]
        x_place += codec.TILE
        weight_place += codec.TILE * weight_column
    place = out + row[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.autotune(tuned(CONFIGS), key=["rows", "columns"])
@triton.jit
def _wgrad(
    grad,
    grad_scales,
    x,
    x_scales,
    out,
    group_sizes,
    rows,
    columns,
    width,
    num_groups,
    MAX_GROUPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """``width`` is the length of a stored (transposed) row of both operands; K has no rest, for groups are padded."""
    group = tl.program_id(2)
    index = tl.arange(0, MAX_GROUPS)
    sizes = tl.load(group_sizes + index, mask=index <= group, other=0).to(tl.int32)
    tiles = tl.cdiv(sizes, codec.TILE)
    last_tile = tl.sum(tiles, 0)
    first_tile = last_tile - tl.sum(tl.where(index == group, tiles, 0), 0)
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    row_inside, column_inside = row < rows, column < columns
    k = first_tile * codec.TILE + tl.arange(0, codec.TILE)
    grad_place = grad + row[:, None].to(tl.int64) * width + k[None, :]
    x_place = x + column[None, :].to(tl.int64) * width + k[:, None]
    grad_scale_place = grad_scales + first_tile.to(tl.int64) * rows + row
    x_scale_place = x_scales + first_tile.to(tl.int64) * columns + column
    total = tl.zeros([M, N], tl.float32)
    for _ in range(first_tile, last_tile):
        a = tl.load(grad_place, mask=row_inside[:, None], other=0.0)
        b = tl.load(x_place, mask=column_inside[None, :], other=0.0)
        row_scales = codec.load_scales(grad_scale_place, row_inside)
        column_scales = codec.load_scales(x_scale_place, column_inside)
        total += tl.dot(a, b) * row_scales[:, None] * column_scales[None, :]
        grad_place += codec.TILE
        x_place += codec.TILE
        grad_scale_place += rows
        x_scale_place += columns
    place = out + (group.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])
