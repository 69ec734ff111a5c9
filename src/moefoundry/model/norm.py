"""Normalization layers: a weight, no bias, and fp32 arithmetic for narrower inputs, as every family they reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefoundry.config import NormConfig, NormKind


class Norm(nn.Module):
    """What both kinds share; the result has the dtype of the input."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self._normalize(x.to(dtype), self.weight.to(dtype)).to(x.dtype)

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class RMSNorm(Norm):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dim (arXiv 1910.07467)."""

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


class LayerNorm(Norm):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight`` over the last dim (arXiv 1607.06450), without a bias, as DBRX."""

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, eps=self.eps)


def build_norm(width: int, cfg: NormConfig) -> Norm:
    """The norm that the recipe's ``model.norm`` declares."""
    kinds = {NormKind.rmsnorm: RMSNorm, NormKind.layernorm: LayerNorm}
    return kinds[cfg.kind](width, cfg.eps)
