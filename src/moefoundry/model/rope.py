"""Rotary position embedding (arXiv 2104.09864) in both conventions, and its extensions to longer contexts.

    rotate              pairs (x[i], x[i + d/2]), as Hugging Face's Llama family
    rotate_interleaved  pairs (x[2i], x[2i + 1]), as DeepSeek's published weights

d is the width that is rotated: a head's, or that of the part of a head that has a position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moefoundry.config import AttentionConfig, Llama3RopeConfig, LongRopeConfig, YarnConfig
from moefoundry.ops.row_kernels import row_kernels


class Rotation:
    """Cosines and sines, fp32 [S, d/2] each, or [B, 1, S, d/2] if the positions of sequences differ.

    It is neither a NamedTuple nor a dataclass: FSDP would round their tensors to a block's compute dtype.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    @property
    def width(self) -> int:
        """Width that is rotated; 0 rotates nothing."""
        return 2 * self.cos.shape[-1]


def rotation(positions: Tensor, width: int, cfg: AttentionConfig, lengths: Tensor | None = None) -> Rotation:
    """Compute the rotation of tokens by their positions.

    It is computed in each forward pass, so that the model has no buffer that ``to_empty`` would clear.

    Args:
        positions: int64 [S], or [B, S].
        width: d, even; 0 rotates nothing.
        cfg: Has the base of the frequencies, and the factors of an extension.
        lengths: Tokens of the sequence that each token is in, int64, a scalar or as ``positions``; LongRoPE needs it.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    wavelengths = cfg.rope_theta**exponents  # over 2 pi
    frequencies: Tensor = 1.0 / wavelengths
    magnitude: Tensor | float = 1.0
    if cfg.yarn is not None:
        frequencies, magnitude = _extended(frequencies, cfg.rope_theta, cfg.yarn), _magnitude(cfg.yarn)
    if cfg.llama3_rope is not None:
        frequencies = _divided_where_slow(frequencies, cfg.llama3_rope)
    if cfg.longrope is not None and width:
        assert lengths is not None, "the caller knows them"
        frequencies, magnitude = _of_length(wavelengths, cfg.longrope, lengths.unsqueeze(-1))
    angles = positions.unsqueeze(-1).float() * frequencies
    if positions.dim() == 2:  # the same for all heads
        angles = angles.unsqueeze(1)
        magnitude = magnitude.unsqueeze(1) if isinstance(magnitude, Tensor) and magnitude.dim() == 3 else magnitude
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)


def rotate(x_BHSd: Tensor, rot: Rotation) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of each head; computed in fp32, returned in the dtype of ``x``."""
    if (kernels := row_kernels(x_BHSd)) is not None:
        return kernels.rotate(x_BHSd, rot.cos, rot.sin)
    first, second = _at_least_fp32(x_BHSd).chunk(2, dim=-1)
    turned = torch.cat([first * rot.cos - second * rot.sin, second * rot.cos + first * rot.sin], dim=-1)
    return turned.to(x_BHSd.dtype)


def rotate_interleaved(x_BHSd: Tensor, rot: Rotation) -> Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of each head; computed in fp32, returned in the dtype of ``x``."""
    if (kernels := row_kernels(x_BHSd)) is not None:
        return kernels.rotate(x_BHSd, rot.cos, rot.sin, interleaved=True)
    first, second = _at_least_fp32(x_BHSd).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * rot.cos - second * rot.sin, second * rot.cos + first * rot.sin], dim=-1)
    return turned.flatten(-2).to(x_BHSd.dtype)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """Compute ``0.1 * weight * ln(factor) + 1``, the sharpening of attention in a context ``factor`` times as long.

    YaRN, arXiv 2309.00071, equation 22; the weights are DeepSeek's.
    """
    return 0.1 * weight * math.log(factor) + 1.0


def _magnitude(yarn: YarnConfig) -> float:
    """Compute the factor of cosines and sines. DeepSeek sharpens in the softmax scale, and divides by it here."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor)


def _extended(frequencies: Tensor, theta: float, yarn: YarnConfig) -> Tensor:
    """Change frequencies as YaRN does (section 3.2): fast ones stay, slow ones are divided, with a ramp in between."""
    width = 2 * len(frequencies)

    def index_of(rotations: float) -> float:
        """Find the frequency that makes this many rotations over the original context."""
        wavelength = yarn.original_max_seq_len / (2 * math.pi * rotations)
        return width * math.log(wavelength) / (2 * math.log(theta))

    low, high = index_of(yarn.beta_fast), index_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    steps = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32) - low
    slow = (steps / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow)


def _divided_where_slow(frequencies: Tensor, cfg: Llama3RopeConfig) -> Tensor:
    """Change frequencies as Llama 3.1 does: by their rotations over the original context, with a ramp in between."""
    rotations = cfg.original_max_seq_len / (2 * math.pi / frequencies)
    fast = ((rotations - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)).clamp(0, 1)
    return (1 - fast) * frequencies / cfg.factor + fast * frequencies


def _of_length(wavelengths: Tensor, cfg: LongRopeConfig, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Choose frequencies, [..., d/2], and magnitudes, [..., 1], as LongRoPE does by the lengths, [..., 1]."""
    is_long = lengths > cfg.original_max_seq_len
    short, long = (wavelengths.new_tensor(factors) for factors in (cfg.short_factors, cfg.long_factors))
    magnitudes = wavelengths.new_tensor([cfg.short_magnitude, cfg.long_magnitude])
    return 1.0 / (torch.where(is_long, long, short) * wavelengths), torch.where(is_long, magnitudes[1], magnitudes[0])


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
