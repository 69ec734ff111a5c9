"""The functions of ``swiglu.py`` as Triton kernels; scales are powers of two.

Where rows are quantized, a program has 128 columns, a tile of each of its rows; where columns are, it has 128 rows,
which begin where ``quantize_columns`` begins them. The backward pass is two kernels, as one that did both would spill.
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
from moefoundry.ops.fp8.formats import Format, QuantizedTensor, Tile, num_column_tiles
from moefoundry.ops.fp8.groups import all_rows
from moefoundry.ops.fp8.swiglu import Backward, Forward
from moefoundry.ops.fp8.triton_quantize import ROW_CONFIGS, tuned
from moefoundry.ops.sizes import TILE, num_tiles

COLUMN_CONFIGS = [
    triton.Config({"COLUMNS": columns}, num_warps=warps) for columns, warps in ((32, 4), (64, 8), (128, 16))
]
"""Without spills: a thread has 32 elements of each operand."""


def swiglu_forward_triton(gate_RF: Tensor, up_RF: Tensor, row_weights_R: Tensor | None, keep: bool) -> Forward:
    """Compute :func:`moefoundry.ops.fp8.swiglu.swiglu_forward` for plain SwiGLU."""
    rows, columns = gate_RF.shape
    results = [_rows(rows, columns, gate_RF.device) for _ in range(3 if keep else 1)]
    hidden, gate, up = results if keep else results * 3

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["ROWS"]), num_tiles(columns)

    if gate_RF.numel():
        _forward[grid](
            gate_RF.contiguous(),
            up_RF.contiguous(),
            _weights(row_weights_R),
            *_codes(hidden),
            *_codes(gate),
            *_codes(up),
            rows,
            columns,
            FORMAT=Format.E4M3,
            KEEP=keep,
        )
    return Forward(hidden, (gate, up) if keep else ())


def swiglu_backward_triton(
    grad_RF: Tensor,
    kept: tuple[QuantizedTensor, QuantizedTensor],
    row_weights_R: Tensor | None,
    group_sizes_E: Tensor | None,
) -> Backward:
    """Compute :func:`moefoundry.ops.fp8.swiglu.swiglu_backward_in_tiles` for plain SwiGLU."""
    (rows, columns), device = grad_RF.shape, grad_RF.device
    sizes_E = all_rows(rows, device) if group_sizes_E is None else group_sizes_E
    tiles, across = num_column_tiles(rows, len(sizes_E)), num_tiles(columns)
    of_rows = _rows(rows, columns, device), _rows(rows, columns, device)
    of_columns = [_columns(rows, columns, tiles, group_sizes_E, device) for _ in range(3)]
    parts = None if row_weights_R is None else torch.empty(across, rows, dtype=torch.float32, device=device)
    operands = grad_RF.contiguous(), *_codes(kept[0]), *_codes(kept[1]), _weights(row_weights_R)
    if grad_RF.numel():

        def row_grid(meta: dict[str, Any]) -> tuple[int, int]:
            return triton.cdiv(rows, meta["ROWS"]), across

        _backward_rows[row_grid](
            *operands, *_codes(of_rows[0]), *_codes(of_rows[1]), parts, rows, columns, FORMAT=Format.E4M3
        )
    if tiles and columns:

        def column_grid(meta: dict[str, Any]) -> tuple[int, int]:
            return tiles, triton.cdiv(columns, meta["COLUMNS"])

        _backward_columns[column_grid](
            *operands,
            *(tensor for x in of_columns for tensor in _codes(x)),
            sizes_E,
            columns,
            tiles,
            len(sizes_E),
            FORMAT=Format.E4M3,
            MAX_GROUPS=triton.next_power_of_2(len(sizes_E)),
        )
    grad_weights_R = None
    if row_weights_R is not None and parts is not None:
        grad_weights_R = parts.sum(0).to(row_weights_R.dtype)
    return Backward(of_columns[0], of_rows, (of_columns[1], of_columns[2]), grad_weights_R)


def _rows(rows: int, columns: int, device: torch.device) -> QuantizedTensor:
    values = torch.empty(rows, columns, dtype=Format.E4M3.dtype, device=device)
    scales = torch.empty(rows, num_tiles(columns), dtype=torch.uint8, device=device)
    return QuantizedTensor(values, scales, Tile.ROW, (rows, columns))


def _columns(
    rows: int, columns: int, tiles: int, group_sizes_E: Tensor | None, device: torch.device
) -> QuantizedTensor:
    values = torch.empty(columns, tiles * TILE, dtype=Format.E4M3.dtype, device=device)
    scales = torch.empty(tiles, columns, dtype=torch.uint8, device=device)
    return QuantizedTensor(values, scales, Tile.COLUMN, (rows, columns), Format.E4M3, group_sizes_E)


def _codes(x: QuantizedTensor) -> tuple[Tensor, Tensor]:
    return x.values.contiguous().view(torch.uint8), x.scales.contiguous()


def _weights(row_weights_R: Tensor | None) -> Tensor | None:
    return None if row_weights_R is None else row_weights_R.contiguous()


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round float32 to ``dtype``, and give it as float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def store_rows(x, values, scales, row, inside, tile, columns, FORMAT: tl.constexpr):
    """Quantize ``x`` [rows, 128] in tiles of 1x128."""
    codes, row_scales = codec.quantize(x, tl.max(codec.magnitude(x), 1, keep_dims=True), FORMAT, False)
    place = scales + row[:, None] * tl.cdiv(columns, codec.TILE) + tile
    tl.store(place, row_scales.to(tl.uint8), mask=inside[:, None])
    codec.store_codes(
        values, codes, row[:, None], inside[:, None], columns, tile * codec.TILE, columns, codec.TILE, FORMAT
    )


@triton.jit
def load_rows(values, scales, row, inside, first, columns, SIZE: tl.constexpr, FORMAT: tl.constexpr):
    """Load and dequantize columns from ``first`` on, [rows, SIZE]; they are in one tile of each row."""
    codes = codec.load_codes(values, row[:, None], inside[:, None], columns, first, columns, SIZE, FORMAT)
    row_scales = codec.load_scales(scales + row * tl.cdiv(columns, codec.TILE) + first // codec.TILE, inside)
    return codec.decode(codes, FORMAT) * row_scales[:, None]


@triton.jit
def store_columns(x, values, scales, tile, tiles, first, columns, SIZE: tl.constexpr, FORMAT: tl.constexpr):
    """Quantize ``x`` [128, SIZE] in tiles of 128x1, stored transposed; it is the ``tile``-th of ``tiles``."""
    codes, column_scales = codec.quantize(x, tl.max(codec.magnitude(x), 0, keep_dims=True), FORMAT, False)
    column = first + tl.arange(0, SIZE)
    place = scales + tile.to(tl.int64) * columns + column[None, :]
    tl.store(place, column_scales.to(tl.uint8), mask=(column < columns)[None, :])
    place = values + column.to(tl.int64)[:, None] * tiles * codec.TILE + tile * codec.TILE
    place += tl.arange(0, codec.TILE)[None, :]
    tl.store(place, tl.trans(codes), mask=(column < columns)[:, None])


@triton.autotune(tuned(ROW_CONFIGS), key=["columns", "KEEP"])
@triton.jit
def _forward(
    gate,
    up,
    row_weights,
    hidden_values,
    hidden_scales,
    gate_values,
    gate_scales,
    up_values,
    up_scales,
    rows,
    columns,
    FORMAT: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    dtype: tl.constexpr = gate.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tile * codec.TILE + tl.arange(0, codec.TILE)[None, :]
    inside = row < rows
    place, mask = row[:, None] * columns + column, inside[:, None] & (column < columns)
    g = tl.load(gate + place, mask=mask, other=0).to(tl.float32)
    u = tl.load(up + place, mask=mask, other=0).to(tl.float32)
    if KEEP:
        store_rows(g, gate_values, gate_scales, row, inside, tile, columns, FORMAT)
        store_rows(u, up_values, up_scales, row, inside, tile, columns, FORMAT)
    hidden = rounded(rounded(g * tl.sigmoid(g), dtype) * u, dtype)
    if row_weights is not None:
        hidden = rounded(hidden * tl.load(row_weights + row, mask=inside, other=0).to(tl.float32)[:, None], dtype)
    store_rows(hidden, hidden_values, hidden_scales, row, inside, tile, columns, FORMAT)


@triton.jit
def gradients(g, u, dh, dtype: tl.constexpr):
    """Compute the gradients of gate and up from that of SwiGLU without its weights."""
    sigmoid = tl.sigmoid(g)
    grad_gate = rounded(rounded(dh * u, dtype) * (sigmoid * (1 + g * (1 - sigmoid))), dtype)
    return grad_gate, rounded(rounded(g * sigmoid, dtype) * dh, dtype)


@triton.autotune(tuned(ROW_CONFIGS), key=["columns"])
@triton.jit
def _backward_rows(
    grad,
    gate_values,
    gate_scales,
    up_values,
    up_scales,
    row_weights,
    grad_gate_values,
    grad_gate_scales,
    grad_up_values,
    grad_up_scales,
    grad_weight_parts,
    rows,
    columns,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Quantize both gradients in rows; give this tile's part of the row weights' gradient."""
    dtype: tl.constexpr = grad.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    inside = row < rows
    column = tile * codec.TILE + tl.arange(0, codec.TILE)[None, :]
    mask = inside[:, None] & (column < columns)
    g = rounded(load_rows(gate_values, gate_scales, row, inside, tile * codec.TILE, columns, codec.TILE, FORMAT), dtype)
    u = rounded(load_rows(up_values, up_scales, row, inside, tile * codec.TILE, columns, codec.TILE, FORMAT), dtype)
    dh = tl.load(grad + row[:, None] * columns + column, mask=mask, other=0).to(tl.float32)
    if row_weights is not None:
        out = rounded(rounded(g * tl.sigmoid(g), dtype) * u, dtype)
        part = tl.sum(rounded(out * dh, dtype), 1)
        tl.store(grad_weight_parts + tile.to(tl.int64) * rows + row, part, mask=inside)
        weight = tl.load(row_weights + row, mask=inside, other=0).to(tl.float32)
        dh = rounded(dh * rounded(weight, dtype)[:, None], dtype)
    grad_gate, grad_up = gradients(g, u, dh, dtype)
    store_rows(grad_gate, grad_gate_values, grad_gate_scales, row, inside, tile, columns, FORMAT)
    store_rows(grad_up, grad_up_values, grad_up_scales, row, inside, tile, columns, FORMAT)


@triton.autotune(tuned(COLUMN_CONFIGS), key=["columns"])
@triton.jit
def _backward_columns(
    grad,
    gate_values,
    gate_scales,
    up_values,
    up_scales,
    row_weights,
    hidden_values,
    hidden_scales,
    grad_gate_values,
    grad_gate_scales,
    grad_up_values,
    grad_up_scales,
    group_sizes,
    columns,
    tiles,
    num_groups,
    FORMAT: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize weighted SwiGLU and both gradients in columns."""
    dtype: tl.constexpr = grad.dtype.element_ty
    tile, first_column = tl.program_id(0), tl.program_id(1) * COLUMNS  # COLUMNS divides a tile
    _, first, end = codec.rows_of_tile(group_sizes, tile, num_groups, MAX_GROUPS, codec.TILE)
    row = (first + tl.arange(0, codec.TILE)).to(tl.int64)
    inside = row < end
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < columns)
    g = rounded(load_rows(gate_values, gate_scales, row, inside, first_column, columns, COLUMNS, FORMAT), dtype)
    u = rounded(load_rows(up_values, up_scales, row, inside, first_column, columns, COLUMNS, FORMAT), dtype)
    dh = tl.load(grad + row[:, None] * columns + column, mask=mask, other=0).to(tl.float32)
    out = rounded(rounded(g * tl.sigmoid(g), dtype) * u, dtype)
    if row_weights is not None:
        weight = tl.load(row_weights + row, mask=inside, other=0).to(tl.float32)
        out = rounded(out * weight[:, None], dtype)
        dh = rounded(dh * rounded(weight, dtype)[:, None], dtype)
    store_columns(out, hidden_values, hidden_scales, tile, tiles, first_column, columns, COLUMNS, FORMAT)
    grad_gate, grad_up = gradients(g, u, dh, dtype)
    store_columns(grad_gate, grad_gate_values, grad_gate_scales, tile, tiles, first_column, columns, COLUMNS, FORMAT)
    store_columns(grad_up, grad_up_values, grad_up_scales, tile, tiles, first_column, columns, COLUMNS, FORMAT)
