"""AdamW's update with BF16 moments as one Triton kernel: 20 bytes an element.

By operators a step moves 52, or 272 with stochastic rounding: moments are widened in memory, and every step of the hash
is a pass. The arithmetic is that of torch's fused kernel for CUDA, operation by operation; rounding and random bits are
those of ``ops/stochastic_rounding.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


class Update(NamedTuple):
    """Constants of an update; torch's, and likewise named."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def update_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    update: Update,
    steps_before: int,
    counter: int | None = None,
) -> None:
    """Update a parameter and its moments in place.

    Args:
        parameter: fp32, contiguous, any shape.
        gradient: fp32, likewise.
        exp_avg: BF16, likewise.
        exp_avg_sq: BF16, likewise.
        update: Constants.
        steps_before: Number of the updates so far.
        counter: Counter of the first element for the random bits of rounding; the others follow. None rounds to the
            nearest.
    """
    size, step = parameter.numel(), steps_before + 1
    if not size:
        return
    adamw[(triton.cdiv(size, BLOCK),)](
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        size,
        counter or 0,
        update.lr,
        update.beta1,
        update.beta2,
        update.eps,
        update.weight_decay,
        1 - update.beta1**step,
        (1 - update.beta2**step) ** 0.5,
        STOCHASTIC=counter is not None,
        SIZE=BLOCK,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["counter"])
def adamw(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    size,
    counter,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    correction1,
    root_of_correction2,
    STOCHASTIC: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Update ``SIZE`` elements."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < size
    p = tl.load(parameter + place, mask=inside, other=0.0)
    g = tl.load(gradient + place, mask=inside, other=0.0)
    first = tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq + place, mask=inside, other=0.0).to(tl.float32)
    p -= lr * weight_decay * p
    first = tl.fma(first, beta1, tl.fma(g, -beta1, g))
    square = g * g
    second = tl.fma(second, beta2, tl.fma(square, -beta2, square))
    denominator = tl.div_rn(tl.sqrt_rn(second), root_of_correction2) + eps
    step_size = tl.div_rn(lr, correction1)
    p -= tl.div_rn(step_size * first, denominator)
    tl.store(parameter + place, p, mask=inside)
    if STOCHASTIC:
        bits = hashed((place + counter).to(tl.uint32))
        noise_of_first, noise_of_second = bits & 0xFFFF, bits >> 16
    else:
        noise_of_first, noise_of_second = to_nearest(first), to_nearest(second)
    tl.store(exp_avg + place, rounded(first, noise_of_first), mask=inside)
    tl.store(exp_avg_sq + place, rounded(second, noise_of_second), mask=inside)


@triton.jit
def hashed(bits):
    """Hash counters as ``hash_bits`` does."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def to_nearest(x):
    """Give the noise with which ``rounded`` rounds to the nearest, ties to even."""
    return 0x7FFF + ((x.to(tl.uint32, bitcast=True) >> 16) & 1)


@triton.jit
def rounded(x, noise):
    """Round fp32 to BF16 as ``round_stochastically`` does."""
    bits = (x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
