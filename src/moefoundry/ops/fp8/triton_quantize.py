"""The quantizers of ``reference.py`` as Triton kernels: one pass over memory, no wait for the host.

Rows are addressed with 64 bits. Block sizes are chosen by measuring, once for each width and dtype; not again when the
number of rows changes, as it does with every batch. They do not change the result.
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
from moefoundry.ops.fp8.formats import Format, QuantizedTensor, Scaling, Tile, num_column_tiles
from moefoundry.ops.fp8.groups import all_rows
from moefoundry.ops.sizes import TILE, num_tiles


def tuned(configs: list[triton.Config]) -> list[triton.Config]:
    """Give the configs to tune over; the interpreter, which cannot measure, gets the first."""
    return configs[:1] if triton.knobs.runtime.interpret else configs


ROW_CONFIGS = [triton.Config({"ROWS": rows}, num_warps=warps) for rows, warps in ((32, 4), (16, 4), (64, 8), (8, 2))]
BLOCK_CONFIGS = [triton.Config({}, num_warps=warps) for warps in (8, 4, 16)]
COLUMN_CONFIGS = [
    triton.Config({"COLUMNS": columns}, num_warps=warps) for columns, warps in ((64, 4), (32, 4), (128, 8))
]


def quantize_triton(x: Tensor, tile: Tile, format: Format, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.quantize`."""
    *batch, rows, columns = x.shape
    row_tiles = rows if tile is Tile.ROW else num_tiles(rows)
    values = torch.empty(*batch, rows, format.width(columns), dtype=torch.uint8, device=x.device)
    scales = torch.empty(*batch, row_tiles, num_tiles(columns), dtype=_scale_dtype(scaling), device=x.device)
    if x.numel() and tile is Tile.ROW:
        _launch_rows(x.contiguous(), _words(values, format), scales, FORMAT=format, FP32_SCALES=scaling is Scaling.FP32)
    elif x.numel():
        _launch_blocks(x.contiguous(), values, scales, scaling, transposed=False)
    return QuantizedTensor(values.view(format.dtype), scales, tile, tuple(x.shape), format)


def quantize_transposed_triton(x: Tensor, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.quantize_transposed`."""
    *batch, rows, columns = x.shape
    values = torch.empty(*batch, columns, rows, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*batch, num_tiles(columns), num_tiles(rows), dtype=_scale_dtype(scaling), device=x.device)
    if x.numel():
        _launch_blocks(x.contiguous(), values, scales, scaling, transposed=True)
    return QuantizedTensor(values.view(Format.E4M3.dtype), scales, Tile.BLOCK, (*batch, columns, rows))


def _launch_rows(x: Tensor, words: Tensor, scales: Tensor, **constants: Any) -> None:
    columns = x.shape[-1]
    rows = x.numel() // columns

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["ROWS"]), num_tiles(columns)

    _quantize_rows[grid](x, words, scales, rows, columns, words.shape[-1], **constants)


def _launch_blocks(x: Tensor, values: Tensor, scales: Tensor, scaling: Scaling, transposed: bool) -> None:
    rows, columns = x.shape[-2:]
    grid = num_tiles(rows), num_tiles(columns), x.numel() // (rows * columns)
    fp32 = scaling is Scaling.FP32
    _quantize_blocks[grid](
        x, values, scales, rows, columns, FORMAT=Format.E4M3, FP32_SCALES=fp32, TRANSPOSED=transposed
    )


def quantize_columns_triton(x_RC: Tensor, group_sizes_E: Tensor | None, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.quantize_columns`."""
    source = x_RC.contiguous()
    return _columns(source, source, source.shape[1], tuple(x_RC.shape), None, group_sizes_E, scaling)


def retile_triton(x: QuantizedTensor, group_sizes_E: Tensor | None, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.retile`."""
    values, scales = _words(x.values.contiguous(), x.format), x.scales.contiguous()
    return _columns(values, scales, values.shape[-1], x.shape, x.format, group_sizes_E, scaling)


def dequantize_triton(x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.dequantize` for ROW and BLOCK tiles."""
    rows, columns = x.shape[-2:]
    out = torch.empty(x.shape, dtype=dtype, device=x.values.device)
    if not out.numel():
        return out
    values, scales = _words(x.values.contiguous(), x.format), x.scales.contiguous()
    matrix_rows = rows if x.tile is Tile.BLOCK else out.numel() // columns
    matrices = out.numel() // (matrix_rows * columns)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(matrix_rows, meta["ROWS"]), num_tiles(columns), matrices

    _dequantize[grid](
        values, scales, out, matrix_rows, columns, values.shape[-1], FORMAT=x.format, SCALE_ROWS=x.tile.value[0]
    )
    return out


def _columns(
    values: Tensor,
    scales: Tensor,
    width: int,
    shape: tuple[int, ...],
    source: Format | None,
    group_sizes_E: Tensor | None,
    scaling: Scaling,
) -> QuantizedTensor:
    rows, columns = shape
    sizes_E = all_rows(rows, values.device) if group_sizes_E is None else group_sizes_E
    tiles = num_column_tiles(rows, len(sizes_E))
    out = torch.empty(columns, tiles * TILE, dtype=torch.uint8, device=values.device)
    out_scales = torch.empty(tiles, columns, dtype=_scale_dtype(scaling), device=values.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return tiles, triton.cdiv(columns, meta["COLUMNS"])

    if tiles and columns:
        _quantize_columns[grid](
            values,
            scales,
            out,
            out_scales,
            sizes_E,
            columns,
            width,
            tiles,
            len(sizes_E),
            SOURCE=source,
            FORMAT=Format.E4M3,
            FP32_SCALES=scaling is Scaling.FP32,
            MAX_GROUPS=triton.next_power_of_2(len(sizes_E)),
        )
    values = out.view(torch.float8_e4m3fn)
    return QuantizedTensor(values, out_scales, Tile.COLUMN, (rows, columns), Format.E4M3, group_sizes_E)


def _words(values: Tensor, format: Format) -> Tensor:
    """View values in the dtype that kernels read and write."""
    return values.view(torch.uint8 if format is Format.E4M3 else torch.int32)


def _scale_dtype(scaling: Scaling) -> torch.dtype:
    return torch.float32 if scaling is Scaling.FP32 else torch.uint8


@triton.autotune(tuned(ROW_CONFIGS), key=["columns", "FORMAT", "FP32_SCALES"])
@triton.jit
def _quantize_rows(
    x, values, scales, rows, columns, width, FORMAT: tl.constexpr, FP32_SCALES: tl.constexpr, ROWS: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    tile = tl.program_id(1)
    column = tile * codec.TILE + tl.arange(0, codec.TILE)[None, :]
    inside = (row < rows) & (column < columns)
    tiles = tl.load(x + row * columns + column, mask=inside, other=0).to(tl.float32)
    amax = tl.max(codec.magnitude(tiles), 1, keep_dims=True)
    codes, row_scales = codec.quantize(tiles, amax, FORMAT, FP32_SCALES)
    tl.store(
        scales + row * tl.cdiv(columns, codec.TILE) + tile, row_scales.to(scales.dtype.element_ty), mask=row < rows
    )
    codec.store_codes(values, codes, row, row < rows, width, tile * codec.TILE, columns, codec.TILE, FORMAT)


@triton.autotune(tuned(BLOCK_CONFIGS), key=["columns", "FP32_SCALES", "TRANSPOSED"])
@triton.jit
def _quantize_blocks(
    x, values, scales, rows, columns, FORMAT: tl.constexpr, FP32_SCALES: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Quantize matrices [rows, columns]; ``TRANSPOSED`` stores them, and their scales, as [columns, rows]."""
    block_row, block_column, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (block_row * codec.TILE + tl.arange(0, codec.TILE))[:, None]
    column = block_column * codec.TILE + tl.arange(0, codec.TILE)[None, :]
    inside = (row < rows) & (column < columns)
    place = (matrix * rows + row) * columns + column
    block = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    amax = tl.max(tl.max(codec.magnitude(block), 1, keep_dims=True), 0, keep_dims=True)
    codes, scale = codec.quantize(block, amax, FORMAT, FP32_SCALES)
    block_rows, block_columns = tl.cdiv(rows, codec.TILE), tl.cdiv(columns, codec.TILE)
    if TRANSPOSED:
        out_row = (block_column * codec.TILE + tl.arange(0, codec.TILE))[:, None]
        out_column = block_row * codec.TILE + tl.arange(0, codec.TILE)[None, :]
        out_inside = (out_row < columns) & (out_column < rows)
        tl.store(values + (matrix * columns + out_row) * rows + out_column, tl.trans(codes), out_inside)
        index = (matrix * block_columns + block_column) * block_rows + block_row
    else:
        tl.store(values + place, codes, mask=inside)
        index = (matrix * block_rows + block_row) * block_columns + block_column
    tl.store(scales + index + tl.zeros([1, 1], tl.int32), scale.to(scales.dtype.element_ty))


@triton.autotune(tuned(COLUMN_CONFIGS), key=["columns", "SOURCE", "FP32_SCALES"])
@triton.jit
def _quantize_columns(
    x,
    x_scales,
    values,
    scales,
    group_sizes,
    columns,
    width,
    tiles,
    num_groups,
    SOURCE: tl.constexpr,
    FORMAT: tl.constexpr,
    FP32_SCALES: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize columns; ``SOURCE`` is the format of codes in ``x``, which ``x_scales`` scale in rows; None: numbers."""
    tile = tl.program_id(0)
    _, first, end = codec.rows_of_tile(group_sizes, tile, num_groups, MAX_GROUPS, codec.TILE)
    row_1d = (first + tl.arange(0, codec.TILE)).to(tl.int64)
    row = row_1d[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < end) & (column < columns)
    if SOURCE is None:
        numbers = tl.load(x + row * width + column, mask=inside, other=0).to(tl.float32)
    else:
        first_column = tl.program_id(1) * COLUMNS
        codes = codec.load_codes(x, row, row < end, width, first_column, columns, COLUMNS, SOURCE)
        numbers = codec.decode(codes, SOURCE)
        source_tile = first_column // codec.TILE  # COLUMNS divides a tile
        row_scales = x_scales + row_1d * tl.cdiv(columns, codec.TILE) + source_tile
        numbers *= codec.load_scales(row_scales, row_1d < end)[:, None]
    amax = tl.max(codec.magnitude(numbers), 0, keep_dims=True)
    codes, column_scales = codec.quantize(numbers, amax, FORMAT, FP32_SCALES)
    scale_place = scales + tile.to(tl.int64) * columns + column
    tl.store(scale_place, column_scales.to(scales.dtype.element_ty), mask=column < columns)
    out_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    place = out_column.to(tl.int64) * tiles * codec.TILE + tile * codec.TILE + tl.arange(0, codec.TILE)[None, :]
    tl.store(values + place, tl.trans(codes), mask=out_column < columns)


@triton.autotune(tuned(ROW_CONFIGS), key=["columns", "FORMAT", "SCALE_ROWS"])
@triton.jit
def _dequantize(
    values, scales, out, rows, columns, width, FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr, ROWS: tl.constexpr
):
    """Dequantize matrices; ``SCALE_ROWS`` rows share a scale."""
    matrix = tl.program_id(2).to(tl.int64)
    rows_1d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = rows_1d[:, None]
    tile = tl.program_id(1)
    column = tile * codec.TILE + tl.arange(0, codec.TILE)[None, :]
    inside = (row < rows) & (column < columns)
    values += matrix * rows * width
    codes = codec.load_codes(values, row, row < rows, width, tile * codec.TILE, columns, codec.TILE, FORMAT)
    scale_row = matrix * tl.cdiv(rows, SCALE_ROWS) + rows_1d // SCALE_ROWS
    row_scales = codec.load_scales(scales + scale_row * tl.cdiv(columns, codec.TILE) + tile, rows_1d < rows)
    numbers = codec.decode(codes, FORMAT) * row_scales[:, None]
    tl.store(out + (matrix * rows + row) * columns + column, numbers.to(out.dtype.element_ty), mask=inside)
