"""FP8 rows as bytes, to be sent: E4M3 values, then one exponent for each 128 of them, filled up to a multiple of 16.

What is sent can be gathered, exchanged and gathered again as plain uint8 rows; it is quantized once, where it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Fp8Codec:
    """Rows <-> bytes; a :class:`moefoundry.moe.dispatch.RowCodec`.

    Attributes:
        backend: The one to use; None chooses by device.
    """

    backend: Backend | None = None

    def encode(self, rows_RC: Tensor) -> Tensor:
        """[R, C] -> uint8 [R, row_bytes(C)]."""
        rows = quantize_rows_once(rows_RC, self.backend)
        used = torch.cat([rows.values.view(torch.uint8), rows.scales], dim=1)
        return F.pad(used, (0, row_bytes(rows_RC.shape[1]) - used.shape[1]))

    def decode(self, sent_RB: Tensor, like: Tensor) -> Tensor:
        """uint8 [R, row_bytes(C)] -> [R, C]; a layer that takes FP8 rows finds those that came, not quantized again."""
        columns = like.shape[-1]
        values = sent_RB[:, :columns].contiguous().view(torch.float8_e4m3fn)
        scales = sent_RB[:, columns : columns + num_tiles(columns)].contiguous()
        rows = QuantizedTensor(values, scales, Tile.ROW, (len(sent_RB), columns))
        decoded_RC = dequantize(rows, like.dtype, self.backend).contiguous()
        remember_rows(decoded_RC, rows)
        return decoded_RC
