"""The number formats of FP8 training, the tiles that share a scale, and the quantized tensor.

Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3. Details that it leaves open are decided here and in ``scales.py``:

- **E4M3** is ``torch.float8_e4m3fn``: bias 7, largest 448, no infinity, NaN 0x7F.
- **E5M6** is the upper 12 bits of an IEEE half: bias 15, subnormals down to 2^-20, largest 65024. Infinities are never
  written; NaN is 0x7E0. Two values take three bytes, the first in the lower 12 bits of a little-endian word of 24; a
  row is padded with zeros to a multiple of 8 values, which are whole words of 32 bits.

Both are rounded to nearest, ties to even, and saturate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum, StrEnum

import torch
from torch import Tensor

from moefoundry.ops.sizes import TILE

PACKED = 8
"""E5M6 values in three words of 32 bits; a row has a multiple of them."""


class Tile(Enum):
    """Rows and columns that share a scale."""

    ROW = (1, TILE)  # activations and their gradients, along K of Fprop and Dgrad
    COLUMN = (TILE, 1)  # the same tensors for Wgrad, whose K is the tokens
    BLOCK = (TILE, TILE)  # weights: the same block serves W and its transpose


class Scaling(StrEnum):
    """Kind of scales."""

    POWER_OF_TWO = "power_of_two"  # one byte, the exponent (E8M0); tiles can be changed with almost no loss
    FP32 = "fp32"


class Format(Enum):
    """A small float of ``bits``: sign, exponent, and ``mantissa_bits``."""

    E4M3 = (8, 3, 7, 448.0, 0x7F)
    E5M6 = (12, 6, 15, 65024.0, 0x7E0)

    def __init__(self, bits: int, mantissa_bits: int, bias: int, largest: float, nan_code: int) -> None:
        self.bits = bits
        self.mantissa_bits = mantissa_bits
        self.bias = bias
        self.largest = largest
        self.nan_code = nan_code
        self.sign_code = 1 << bits - 1
        # exponent, without bias, and 23 bits of mantissa of `largest` as a float32
        self.exponent = math.frexp(largest)[1] - 1
        self.float_mantissa = int((math.ldexp(largest, -self.exponent) - 1) * 2**23)

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor that holds the values."""
        return torch.float8_e4m3fn if self is Format.E4M3 else torch.uint8

    def width(self, columns: int) -> int:
        """Count the elements of :attr:`dtype` in a row of ``columns`` values."""
        return columns if self is Format.E4M3 else 12 * -(-columns // PACKED)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor [..., R, C] as small floats and one scale for each tile; an element is ``value * scale``.

    The last tile of a dimension may be short; ``ROW`` and ``BLOCK`` have no padding. ``COLUMN`` is stored transposed,
    with K (the tokens) last, as tensor cores need it. Each group begins on a new tile there, so that no tile has rows
    of two experts, and the rest of a group's last tile is zero. It has G tiles of rows, an upper bound that the host
    knows without the sizes of the groups.

    Attributes:
        values: E4M3: float8_e4m3fn [..., R, C], or [C, G * 128] with COLUMN tiles. E5M6: uint8
            [..., R, 12 * ceil(C / 8)].
        scales: uint8 exponents (E8M0: the scale is 2^(code - 127)) or float32. ROW: [..., R, ceil(C / 128)]; BLOCK:
            [..., ceil(R / 128), ceil(C / 128)]; COLUMN: [G, C].
        tile: Elements that share a scale.
        shape: (..., R, C).
        format: Format of the values.
        group_sizes: int64 [E], rows of each group, for COLUMN tiles; None is one group.
    """

    values: Tensor
    scales: Tensor
    tile: Tile
    shape: tuple[int, ...]
    format: Format = Format.E4M3
    group_sizes: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Values and scales, for autograd to keep."""
        return self.values, self.scales

    @property
    def scaling(self) -> Scaling:
        return Scaling.POWER_OF_TWO if self.scales.dtype == torch.uint8 else Scaling.FP32

    @property
    def mT(self) -> QuantizedTensor:
        """Transposed matrices, as a view.

        Raises:
            ValueError: The tiles are not square.
        """
        if self.tile is not Tile.BLOCK:
            raise ValueError(f"only BLOCK tiles are the same transposed, not {self.tile.name}; use retile")
        *batch, rows, columns = self.shape
        return replace(self, values=self.values.mT, scales=self.scales.mT, shape=(*batch, columns, rows))

    def transposed(self) -> QuantizedTensor:
        """Transposed matrices, as a copy in which the rows of :attr:`mT` lie one after the other."""
        view = self.mT
        values = view.values.view(torch.uint8).contiguous().view(view.values.dtype)
        return replace(view, values=values, scales=view.scales.contiguous())


def num_column_tiles(rows: int, groups: int) -> int:
    """Compute the most tiles of 128 rows that ``rows`` rows in ``groups`` groups can need."""
    return (rows + groups * (TILE - 1)) // TILE
