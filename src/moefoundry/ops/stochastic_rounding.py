"""Round to BF16 up or down at random, so that the mean is the value itself.

Rounding to the nearest loses every change smaller than half a unit in the last place (2**-9 of the value): a moving
average that should change by less does not change. Stochastic rounding changes it by a whole unit now and then, and is
right on average. Gupta et al., "Deep Learning with Limited Numerical Precision" (arXiv 1502.02551), section 3.

The random bits are a hash of the element's number, not the next bits of a generator. So they are the same on every rank
and mesh, and nothing has to be saved for a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGN_AND_BF16 = -0x10000  # mask of an fp32's upper 16 bits: sign, exponent and BF16's mantissa


def hash_bits(counters: Tensor) -> Tensor:
    """Hash each counter to 32 random-looking bits, in place; ``counters`` is int32 of any shape, and wraps around.

    Two rounds of xor-shift and multiply with constants found by search: every bit of the counter changes each bit of
    the hash with a probability of one half, to within 0.2%. C. Wellons, "Prospecting for Hash Functions" (2018).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        counters ^= _shift_right(counters, shift)
        counters *= factor
    counters ^= _shift_right(counters, 16)
    return counters


def lower_half(bits: Tensor) -> Tensor:
    """Take the lower 16 of 32 bits, int32 -> int32 in [0, 2**16)."""
    return bits & 0xFFFF


def upper_half(bits: Tensor) -> Tensor:
    """Take the upper 16 of 32 bits, int32 -> int32 in [0, 2**16)."""
    return _shift_right(bits, 16)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """Round ``x`` to BF16, up or down with a probability that makes the mean equal to ``x``.

    Args:
        x: fp32, any shape. Zeros, infinities and NaN do not change; a finite value above BF16's largest may become
            infinite, as in rounding to the nearest.
        noise: int32, same shape, uniform in [0, 2**16).
    """
    bits = x.view(torch.int32) + noise  # the larger the lower bits are, the more often they carry into the upper ones
    bits &= SIGN_AND_BF16
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift right and fill with zeros; ``>>`` alone would fill with the sign."""
    return (bits >> count) & ((1 << (32 - count)) - 1)
