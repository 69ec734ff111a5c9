"""Rotary position embedding (arXiv 2104.09864) in both conventions, and YaRN, its extension to longer contexts.

    rotate              pairs (x[i], x[i + d/2]), as Hugging Face's Llama family
    rotate_interleaved  pairs (x[2i], x[2i + 1]), as DeepSeek's published weights

d is the width that is rotated: of a head, or of the part of it that has a position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moefoundry.config import AttentionConfig, YarnConfig


class Rotation:
    """Cosines and sines, fp32 [S, d/2] each, or [B, 1, S, d/2] where the positions of sequences differ.

    Neither a NamedTuple nor a dataclass: FSDP looks into those, and would round the angles to a block's compute dtype.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


def rotation(positions: Tensor, width: int, cfg: AttentionConfig) -> Rotation:
    """The rotation of tokens by their positions.

    Made anew each forward pass, so a model built on meta has no buffer to forget.

    Args:
        positions: int64 [S], or [B, S].
        width: d, even.
        cfg: Says the base of the frequencies, and how YaRN changes them.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    frequencies, magnitude = 1.0 / cfg.rope_theta**exponents, 1.0
    if cfg.yarn is not None:
        frequencies, magnitude = _extended(frequencies, cfg.rope_theta, cfg.yarn), _magnitude(cfg.yarn)
    angles = positions.unsqueeze(-1).float() * frequencies
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)  # the same for all heads
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)


def rotate(x_BHSd: Tensor, rot: Rotation) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of each head; computed in fp32, returned in the dtype of ``x``."""
    first, second = _at_least_fp32(x_BHSd).chunk(2, dim=-1)
    turned = torch.cat([first * rot.cos - second * rot.sin, second * rot.cos + first * rot.sin], dim=-1)
    return turned.to(x_BHSd.dtype)


def rotate_interleaved(x_BHSd: Tensor, rot: Rotation) -> Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of each head; computed in fp32, returned in the dtype of ``x``."""
    first, second = _at_least_fp32(x_BHSd).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * rot.cos - second * rot.sin, second * rot.cos + first * rot.sin], dim=-1)
    return turned.flatten(-2).to(x_BHSd.dtype)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """``0.1 * weight * ln(factor) + 1``: how much attention is sharpened in a context ``factor`` times as long (YaRN,
    arXiv 2309.00071, equation 22; the weights are DeepSeek's)."""
    return 0.1 * weight * math.log(factor) + 1.0


def _magnitude(yarn: YarnConfig) -> float:
    """What cosines and sines are multiplied by. DeepSeek sharpens in the softmax scale, and takes that out here."""
    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor)


def _extended(frequencies: Tensor, theta: float, yarn: YarnConfig) -> Tensor:
    """YaRN's frequencies (section 3.2): the fast ones as they are, the slow ones divided, and a ramp in between."""
    width = 2 * len(frequencies)

    def index_of(rotations: float) -> float:
        """Which frequency turns this often over the original context."""
        wavelength = yarn.original_max_seq_len / (2 * math.pi * rotations)
        return width * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), width - 1)
    steps = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32) - low
    slow = (steps / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
