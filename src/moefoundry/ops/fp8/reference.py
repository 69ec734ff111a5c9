"""Quantize, dequantize and change tiles in plain PyTorch: the definition that the kernels equal bit for bit.

E4M3 values are clamped before the cast: for values that are too large it gives NaN up to torch 2.12, and the largest
value from torch 2.13 on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fp8.e5m6 import decode_e5m6, encode_e5m6, pack_e5m6, unpack_e5m6
from moefoundry.ops.fp8.formats import Format, QuantizedTensor, Scaling, Tile, num_column_tiles
from moefoundry.ops.fp8.groups import all_rows, padded_rows
from moefoundry.ops.fp8.scales import scale_values, scales_of
from moefoundry.ops.sizes import TILE


def quantize_reference(x: Tensor, tile: Tile, format: Format, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.quantize`."""
    rows, columns = x.shape[-2:]
    tiles = _split(x.float(), tile)
    codes, scales = _quantize_tiles(tiles, (-3, -1), format, scaling)
    padded = codes.flatten(-4, -3).flatten(-2)
    codes = padded[..., :rows, :columns]  # not a view of it: weights are kept
    codes = codes.contiguous() if codes.shape == padded.shape else codes.clone(memory_format=torch.contiguous_format)
    values = codes.view(torch.float8_e4m3fn) if format is Format.E4M3 else pack_e5m6(codes)
    return QuantizedTensor(values, scales, tile, tuple(x.shape), format)


def quantize_transposed_reference(x: Tensor, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.quantization.quantize_transposed`."""
    found = quantize_reference(x, Tile.BLOCK, Format.E4M3, scaling).mT
    return replace(found, values=found.values.contiguous(), scales=found.scales.contiguous())


def quantize_columns_reference(x_RC: Tensor, group_sizes_E: Tensor | None, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.quantize_columns`."""
    rows, columns = x_RC.shape
    sizes_E = all_rows(rows, x_RC.device) if group_sizes_E is None else group_sizes_E
    padded = x_RC.new_zeros(num_column_tiles(rows, len(sizes_E)) * TILE, columns, dtype=torch.float32)
    padded.index_copy_(0, padded_rows(sizes_E, rows), x_RC.float())
    codes, scales_GC = _quantize_tiles(padded.unflatten(0, (-1, TILE)), (-2,), Format.E4M3, scaling)
    values = codes.flatten(0, 1).T.contiguous().view(torch.float8_e4m3fn)
    return QuantizedTensor(values, scales_GC, Tile.COLUMN, (rows, columns), Format.E4M3, group_sizes_E)


def dequantize_reference(x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.dequantize`."""
    if x.tile is Tile.COLUMN:
        return _dequantize_columns(x).to(dtype)
    rows, columns = x.shape[-2:]
    values = x.values.float() if x.format is Format.E4M3 else decode_e5m6(unpack_e5m6(x.values, columns))
    tiles = _split(values, x.tile) * scale_values(x.scales)[..., :, None, :, None]
    return tiles.flatten(-4, -3).flatten(-2)[..., :rows, :columns].to(dtype)


def retile_reference(x: QuantizedTensor, group_sizes_E: Tensor | None, scaling: Scaling) -> QuantizedTensor:
    """Compute :func:`moefoundry.ops.fp8.retile`."""
    return quantize_columns_reference(dequantize_reference(x, torch.float32), group_sizes_E, scaling)


def _dequantize_columns(x: QuantizedTensor) -> Tensor:
    padded = x.values.T.float().unflatten(0, (-1, TILE)) * scale_values(x.scales).unsqueeze(1)
    sizes_E = all_rows(x.shape[0], x.values.device) if x.group_sizes is None else x.group_sizes
    return padded.flatten(0, 1).index_select(0, padded_rows(sizes_E, x.shape[0]))


def _split(x: Tensor, tile: Tile) -> Tensor:
    """Split [..., R, C] into [..., row tiles, rows, column tiles, columns]; the last tiles are padded with zeros."""
    tile_rows, tile_columns = tile.value
    missing = -x.shape[-2] % tile_rows, -x.shape[-1] % tile_columns
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    return x.unflatten(-1, (-1, tile_columns)).unflatten(-3, (-1, tile_rows))


def _quantize_tiles(x: Tensor, dims: tuple[int, ...], format: Format, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Compute codes (uint8 or int16, shape of ``x``) and stored scales, one for each slice along ``dims``."""
    scales = scales_of(x.abs().amax(dims, keepdim=True), format, scaling)
    factors = scale_values(scales)
    scaled = (x / factors).clamp_(-format.largest, format.largest)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8) if format is Format.E4M3 else encode_e5m6(scaled)
    return codes.masked_fill_(factors.isnan(), format.nan_code), scales.squeeze(dims)
