"""FP8 rows as bytes to send: E4M3 values, then one exponent for each 128 of them, padded to a multiple of 16 bytes.

Rows are quantized once, by the sender, and then gathered and exchanged as plain uint8 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fp8.formats import QuantizedTensor, Tile
from moefoundry.ops.fp8.quantization import dequantize, quantize_rows_once, remember_rows
from moefoundry.ops.sizes import num_tiles, row_bytes


@dataclass(frozen=True)
class Fp8Codec:
    """A :class:`moefoundry.moe.dispatch.RowCodec` that sends FP8.

    Attributes:
        backend: The backend to use; None chooses by device.
    """

    backend: Backend | None = None

    def encode(self, rows_RC: Tensor) -> Tensor:
        """Encode [R, C] -> uint8 [R, row_bytes(C)]."""
        rows = quantize_rows_once(rows_RC, self.backend)
        used = torch.cat([rows.values.view(torch.uint8), rows.scales], dim=1)
        return F.pad(used, (0, row_bytes(rows_RC.shape[1]) - used.shape[1]))

    def decode(self, sent_RB: Tensor, like: Tensor) -> Tensor:
        """Decode uint8 [R, row_bytes(C)] -> [R, C]; layers that take FP8 rows use those that were sent."""
        columns = like.shape[-1]
        values = sent_RB[:, :columns].contiguous().view(torch.float8_e4m3fn)
        scales = sent_RB[:, columns : columns + num_tiles(columns)].contiguous()
        rows = QuantizedTensor(values, scales, Tile.ROW, (len(sent_RB), columns))
        decoded_RC = dequantize(rows, like.dtype, self.backend).contiguous()
        remember_rows(decoded_RC, rows)
        return decoded_RC
