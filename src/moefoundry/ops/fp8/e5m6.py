"""E5M6 in plain PyTorch: float32 to 12-bit codes and back, and two codes to three bytes and back.

The output projection of attention keeps its input in E5M6 for the backward pass (DeepSeek-V3, section 3.3.3), since
E4M3 is too coarse there. ``formats.py`` defines the format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fp8.formats import PACKED, Format

_HALF_BITS = 4  # bits that an IEEE half has more
_EXPONENT_BITS = 0x7F800000  # mask of a float32's exponent


def encode_e5m6(x: Tensor) -> Tensor:
    """Round float32 to int16 codes of 12 bits, to nearest, ties to even; saturates at 65024; NaN stays NaN."""
    x = x.clamp(-Format.E5M6.largest, Format.E5M6.largest)
    binade = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)  # the power of two at or below |x|
    quantum = binade.clamp_min(Format.E5M6.smallest_normal) * 2.0**-Format.E5M6.mantissa_bits
    half = ((x / quantum).round() * quantum).half()  # exact: a half has these values, and more between them
    codes = (half.view(torch.int16) >> _HALF_BITS) & 0xFFF
    return codes.where(~x.isnan(), Format.E5M6.nan_code)


def decode_e5m6(codes: Tensor) -> Tensor:
    """Decode int16 codes of 12 bits to float32."""
    return (codes << _HALF_BITS).view(torch.float16).float()


def pack_e5m6(codes: Tensor) -> Tensor:
    """Pack int16 codes [..., C] into uint8 [..., 12 * ceil(C / 8)]; rows are padded with zeros."""
    codes = F.pad(codes, (0, -codes.shape[-1] % PACKED))
    first, second = codes.int().unflatten(-1, (-1, 2)).unbind(-1)
    words = first | second << Format.E5M6.bits
    return words.view(torch.uint8).unflatten(-1, (-1, 4))[..., :3].flatten(-2)


def unpack_e5m6(packed: Tensor, columns: int) -> Tensor:
    """Unpack uint8 [..., 12 * ceil(C / 8)] into int16 codes [..., C]; C is ``columns``."""
    low, middle, high = packed.unflatten(-1, (-1, 3)).to(torch.int16).unbind(-1)
    codes = torch.stack([low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)], dim=-1)
    return codes.flatten(-2)[..., :columns]
