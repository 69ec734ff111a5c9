"""FP8 rows as bytes, to be sent: E4M3 values, then one exponent for each 128 of them, filled up to a multiple of 16.

What is sent can be gathered, exchanged and gathered again as plain uint8 rows; it is quantized once, where it starts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fp8.formats import QuantizedTensor, Tile, num_tiles
from moefoundry.ops.fp8.quantization import dequantize, quantize_rows_once, remember_rows

ALIGNMENT = 16
"""Bytes: kernels read rows in pieces of this size."""


def row_bytes(columns: int) -> int:
    """Of a row of so many values."""
    return -(-(columns + num_tiles(columns)) // ALIGNMENT) * ALIGNMENT


def encode_rows(x_RC: Tensor, backend: Backend | None = None) -> Tensor:
    """[R, C] -> uint8 [R, row_bytes(C)]."""
    rows = quantize_rows_once(x_RC, backend)
    used = torch.cat([rows.values.view(torch.uint8), rows.scales], dim=1)
    return F.pad(used, (0, row_bytes(x_RC.shape[1]) - used.shape[1]))


def decode_rows(sent_RB: Tensor, columns: int, dtype: torch.dtype, backend: Backend | None = None) -> Tensor:
    """uint8 [R, row_bytes(C)] -> [R, C]; a layer that takes FP8 rows finds those that came, not quantized again."""
    values = sent_RB[:, :columns].contiguous().view(torch.float8_e4m3fn)
    scales = sent_RB[:, columns : columns + num_tiles(columns)].contiguous()
    rows = QuantizedTensor(values, scales, Tile.ROW, (len(sent_RB), columns))
    x_RC = dequantize(rows, dtype, backend)
    remember_rows(x_RC, rows)
    return x_RC
