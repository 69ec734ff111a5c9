"""The three matrix products as Triton kernels for GPUs whose tensor cores take FP8.

Each step multiplies 128 elements of K on the tensor cores, from zero, and adds the result, times both scales, to a sum
in FP32 registers: the promotion of DeepSeek-V3 (section 3.3.2). Steps come in pairs with an accumulator each: while the
tensor cores multiply the second, the first is promoted, and the second while they multiply the first of the next pair.
The order of the sums is that of the steps.

Where both operands have K last and in whole 16 bytes, as layers give them, they are copied by descriptors (TMA, from
compute capability 9.0 on). The device finds the groups from their sizes; the grid is an upper bound, and programs after
the last group end at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq
from triton.tools.tensor_descriptor import TensorDescriptor

from moefoundry.ops.fp8 import triton_codec as codec
from moefoundry.ops.fp8.formats import QuantizedTensor
from moefoundry.ops.fp8.groups import all_rows
from moefoundry.ops.fp8.triton_quantize import tuned
from moefoundry.ops.sizes import TILE

ALIGNMENT = 16  # bytes of a descriptor's address and strides


def _describe(arguments: dict[str, Any]) -> None:
    """Give descriptors the blocks of a configuration."""
    for name, size in (("x", "M"), ("weights", "N"), ("grad", "M"), ("other", "N")):
        if isinstance(descriptor := arguments.get(name), TensorDescriptor):
            descriptor.block_shape = [*[1] * (len(descriptor.shape) - 2), arguments[size], TILE]


CONFIGS = [
    triton.Config({"M": m, "N": n, "PAIRS": pairs}, num_warps=warps, num_stages=stages, pre_hook=_describe)
    for m, n, pairs, warps, stages in (
        (128, 128, True, 8, 2),
        (128, 128, False, 8, 4),
        (64, 128, True, 4, 2),
        (64, 128, False, 4, 4),
        (64, 64, True, 4, 3),
    )
]
"""A stage has two blocks of both operands where steps come in pairs."""
WGRAD_CONFIGS = [
    triton.Config({"M": m, "N": n}, num_warps=warps, num_stages=stages, pre_hook=_describe)
    for m, n, warps, stages in ((128, 128, 8, 4), (64, 128, 4, 4), (128, 64, 4, 4), (64, 64, 4, 5))
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
    values, weights, weight_scales = x.values.contiguous(), weight.values, weight.scales
    if group_sizes_E is None:
        weights, weight_scales = weights.unsqueeze(0), weight_scales.unsqueeze(0)
    described = _can_describe(values) and _can_describe(weights)

    def grid(meta: dict[str, Any]) -> tuple[int]:  # CUDA's other dims end at 65,535
        return (triton.cdiv(columns, meta["N"]) * ((rows + groups * (meta["M"] - 1)) // meta["M"]),)

    _multiply[grid](
        _descriptor(values) if described else values,
        x.scales.contiguous(),
        _descriptor(weights) if described else weights,
        weight_scales,
        out,
        sizes_E,
        inner,
        columns,
        groups,
        *weights.stride(),
        *weight_scales.stride(),
        DESCRIBED=described,
        MAX_GROUPS=triton.next_power_of_2(groups),
    )
    return out


def wgrad_triton(grad: QuantizedTensor, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.wgrad`."""
    rows, columns = grad.shape[1], x.shape[1]
    sizes_E = all_rows(x.shape[0], x.values.device) if x.group_sizes is None else x.group_sizes
    groups = len(sizes_E)
    out = torch.empty(groups, rows, columns, dtype=dtype, device=x.values.device)
    described = _can_describe(grad.values) and _can_describe(x.values)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(columns, meta["N"]), triton.cdiv(rows, meta["M"]), groups

    if out.numel():
        _wgrad[grid](
            _descriptor(grad.values) if described else grad.values,
            grad.scales,
            _descriptor(x.values) if described else x.values,
            x.scales,
            out,
            sizes_E,
            rows,
            columns,
            x.values.shape[1],
            groups,
            DESCRIBED=described,
            MAX_GROUPS=triton.next_power_of_2(groups),
        )
    return out.squeeze(0) if x.group_sizes is None else out


def _can_describe(values: Tensor) -> bool:
    """Tell if a descriptor can copy E4M3 values by their last dimension."""
    if not values.numel() or not values.is_contiguous() or (values.shape[-1] | values.data_ptr()) % ALIGNMENT:
        return False
    return bool(triton.knobs.runtime.interpret or cuda_capability_geq(9, 0))


def _descriptor(values: Tensor) -> TensorDescriptor:
    """Describe values; the configuration sets the block."""
    return TensorDescriptor.from_tensor(values, [*[1] * (values.dim() - 2), CONFIGS[0].kwargs["M"], TILE])


@triton.jit
def row_block(x, first, row, inside, step, inner, DESCRIBED: tl.constexpr):
    """Load the rows' values of step ``step`` of K, [rows, 128]; zero or another group's rows where none is inside."""
    if DESCRIBED:
        block = x.load([first, step * codec.TILE])
    else:
        k = step * codec.TILE + tl.arange(0, codec.TILE)
        place = x + row[:, None].to(tl.int64) * inner + k[None, :]
        block = tl.load(place, mask=inside[:, None] & (k[None, :] < inner), other=0.0)
    return block


@triton.jit
def weight_block(
    weights, group, first, row, inside, step, inner, weight_group, weight_row, weight_column, DESCRIBED: tl.constexpr
):
    """Load 128 values of K of rows of a group's weight, transposed, [128, rows]."""
    if DESCRIBED:
        block = weights.load([group, first, step * codec.TILE]).reshape(row.shape[0], codec.TILE).T
    else:
        k = step * codec.TILE + tl.arange(0, codec.TILE)
        place = weights + group.to(tl.int64) * weight_group
        place += row[None, :].to(tl.int64) * weight_row + k[:, None].to(tl.int64) * weight_column
        block = tl.load(place, mask=inside[None, :] & (k[:, None] < inner), other=0.0)
    return block


@triton.jit
def operands(x, weights, rows, columns, strides, step, inner, DESCRIBED: tl.constexpr):
    """Load both operands of step ``step`` of K.

    ``rows`` are the first, all, and which are inside; ``columns`` likewise, behind their group.
    """
    a = row_block(x, rows[0], rows[1], rows[2], step, inner, DESCRIBED)
    b = weight_block(weights, *columns, step, inner, *strides, DESCRIBED)
    return a, b


@triton.jit
def scales_at(x_scales, weight_scale, row_inside):
    """Load the scales of rows, times that of the weight's block."""
    return codec.load_scales(x_scales, row_inside) * codec.load_scales(weight_scale, True)


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
    DESCRIBED: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Multiply with the strides, in elements, of ``weights`` [E, N, K] and scales: a transposed weight is a view."""
    tiles_across = tl.cdiv(columns, N)
    tile = tl.program_id(0) // tiles_across
    group, first, end = codec.rows_of_tile(group_sizes, tile, num_groups, MAX_GROUPS, M)
    if first >= end:
        return
    row = first + tl.arange(0, M)
    first_column = tl.program_id(0) % tiles_across * N
    column = first_column + tl.arange(0, N)
    row_inside, column_inside = row < end, column < columns
    x_scale = x_scales + row.to(tl.int64) * tl.cdiv(inner, codec.TILE)
    weight_scale = weight_scales + group * scale_group + (first_column // codec.TILE) * scale_row
    rows, of_weight = (first, row, row_inside), (group, first_column, column, column_inside)
    strides = (weight_group, weight_row, weight_column)
    steps = tl.cdiv(inner, codec.TILE)
    total = tl.zeros([M, N], tl.float32)
    if PAIRS:
        behind, behind_scales = tl.zeros([M, N], tl.float32), tl.zeros([M], tl.float32)
        if steps % 2 == 1:
            a, b = operands(x, weights, rows, of_weight, strides, 0, inner, DESCRIBED)
            behind, behind_scales = tl.dot(a, b), scales_at(x_scale, weight_scale, row_inside)
        for step in range(steps % 2, steps, 2):
            a, b = operands(x, weights, rows, of_weight, strides, step, inner, DESCRIBED)
            a_next, b_next = operands(x, weights, rows, of_weight, strides, step + 1, inner, DESCRIBED)
            scales = scales_at(x_scale + step, weight_scale + step * scale_column, row_inside)
            scales_next = scales_at(x_scale + step + 1, weight_scale + (step + 1) * scale_column, row_inside)
            part = tl.dot(a, b)
            total += behind * behind_scales[:, None]
            behind, behind_scales = tl.dot(a_next, b_next), scales_next
            total += part * scales[:, None]
        total += behind * behind_scales[:, None]
    else:
        for step in range(steps):
            a, b = operands(x, weights, rows, of_weight, strides, step, inner, DESCRIBED)
            scales = scales_at(x_scale + step, weight_scale + step * scale_column, row_inside)
            total += tl.dot(a, b) * scales[:, None]
    place = out + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.autotune(tuned(WGRAD_CONFIGS), key=["rows", "columns"])
@triton.jit
def _wgrad(
    grad,
    grad_scales,
    other,
    other_scales,
    out,
    group_sizes,
    rows,
    columns,
    width,
    num_groups,
    DESCRIBED: tl.constexpr,
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
    first_row, first_column = tl.program_id(1) * M, tl.program_id(0) * N
    row, column = first_row + tl.arange(0, M), first_column + tl.arange(0, N)
    row_inside, column_inside = row < rows, column < columns
    total = tl.zeros([M, N], tl.float32)
    row_scale = grad_scales + first_tile.to(tl.int64) * rows + row
    column_scale = other_scales + first_tile.to(tl.int64) * columns + column
    # a step's scales are loaded a step ahead, but where threads have too many columns for the registers: from 10.0 on
    AHEAD: tl.constexpr = not cuda_capability_geq(10, 0)
    not_empty = first_tile < last_tile  # behind an empty last group there may be no scales
    row_scales = codec.load_scales(row_scale, row_inside & not_empty)
    column_scales = codec.load_scales(column_scale, column_inside & not_empty)
    for tile in range(first_tile, last_tile):
        a = row_block(grad, first_row, row, row_inside, tile, width, DESCRIBED)
        b = row_block(other, first_column, column, column_inside, tile, width, DESCRIBED).T
        if not AHEAD:
            row_scales = codec.load_scales(row_scale, row_inside)
            column_scales = codec.load_scales(column_scale, column_inside)
        row_scale += rows
        column_scale += columns
        if AHEAD:
            more = tile + 1 < last_tile
            rows_next = codec.load_scales(row_scale, row_inside & more)
            columns_next = codec.load_scales(column_scale, column_inside & more)
        total += tl.dot(a, b) * row_scales[:, None] * column_scales[None, :]
        if AHEAD:
            row_scales, column_scales = rows_next, columns_next
    place = out + (group.to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])
