"""Rotary position embedding (arXiv 2104.09864), in the half-rotation convention of Hugging Face's Llama family."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines, fp32 [S, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor


def rotation(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Rotation:
    """The rotation of positions 0 .. seq_len - 1. Made anew each forward pass, so a model built on meta has no buffer
    to forget."""
    half = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), theta ** (-half / head_dim))
    return Rotation(angles.cos(), angles.sin())


def rotate(x_BHSd: Tensor, rot: Rotation) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of each head; computed in fp32, returned in the dtype of ``x``."""
    first, second = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat([first * rot.cos - second * rot.sin, second * rot.cos + first * rot.sin], dim=-1)
    return turned.to(x_BHSd.dtype)
