"""Data that training meets, and how far a result is from the right one."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("normal", "student_t", "outlier_channels", "outliers")
GROUP_SIZES = (0, 1, 127, 128, 129, 384, 500)


def sample(kind: str, *shape: int) -> Tensor:
    """float32, seeded by what it is. Outliers are many enough for products of two of them, which have most of the
    power, to be more than a few: the noise of a few is a matter of luck."""
    generator = torch.Generator().manual_seed(KINDS.index(kind) + sum(shape))
    x = torch.randn(shape, generator=generator)
    if kind == "student_t":  # three degrees of freedom: a normal over the root of a third of a chi-square
        return x / (torch.randn(*shape, 3, generator=generator).square().mean(-1)).sqrt()
    if kind == "outlier_channels":
        x[..., ::17] *= 20
    if kind == "outliers":
        x[torch.rand(shape, generator=generator) < 0.01] *= 20
    return x


def sqnr(got: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise, dB."""
    got, expected = got.double(), expected.double()
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))
