"""Scales of tiles: computed from absolute maxima, and read from their stored form.

A power-of-two scale is the smallest 2^e with ``amax <= largest * 2^e``, so that nothing overflows; the smallest
exponent is -126. A tile that is zero or nearly zero has the scale 2^-126, and its values become zero or subnormal.
Other implementations clamp the maximum at 1e-4 or 1e-10, which loses small gradients. FP32 scales are
``amax / largest``, with the same floor.

A tile with an Inf or a NaN becomes NaN, both scale (E8M0 code 255) and values. A matrix product would spread an Inf or
a NaN to the same outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.fp8.formats import Format, Scaling

MIN_CODE, NAN_CODE = 1, 255
SMALLEST_SCALE = 2.0 ** (MIN_CODE - 127)
FLOAT_EXPONENT = 23  # first bit of a float32's exponent
FLOAT_MANTISSA = (1 << FLOAT_EXPONENT) - 1


def scales_of(amax: Tensor, format: Format, scaling: Scaling) -> Tensor:
    """Compute stored scales, uint8 or float32, from absolute maxima (float32, any shape)."""
    if scaling is Scaling.FP32:
        largest = amax.new_full((), format.largest)  # by a number, CUDA would multiply with its rounded inverse
        scales = amax.clamp_min(SMALLEST_SCALE * format.largest) / largest
        return scales.where(amax.isfinite(), torch.nan)
    bits = amax.view(torch.int32)
    codes = (bits >> FLOAT_EXPONENT) - format.exponent + ((bits & FLOAT_MANTISSA) > format.float_mantissa).int()
    return codes.clamp_min(MIN_CODE).where(amax.isfinite(), NAN_CODE).to(torch.uint8)


def scale_values(scales: Tensor) -> Tensor:
    """Convert stored scales to float32."""
    return scales.view(torch.float8_e8m0fnu).float() if scales.dtype == torch.uint8 else scales
