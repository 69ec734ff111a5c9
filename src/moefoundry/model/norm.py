"""Normalization layers: a weight, maybe a bias, and fp32 arithmetic for narrower inputs, as in published families.

For a narrower input only the input is kept for backward, where its fp32 copy and the norm are computed again. On a GPU
RMSNorm is one kernel, which makes no copy; on a CPU, unless compiled, it is ``ops/cpu_norm.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.config import NormConfig, NormKind
from moefoundry.ops import cpu_norm
from moefoundry.ops.row_kernels import row_kernels


class Norm(nn.Module):
    """Base class of both kinds; the result has the dtype of the input.

    Args:
        width: Elements of a vector.
        eps: Added before the root.
        zero_centered: The factor of an element is its weight plus 1.
        bias: Add a bias.
    """

    def __init__(self, width: int, eps: float, zero_centered: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps
        self.offset = 1.0 if zero_centered else 0.0

    @property
    def start(self) -> float:
        """Initial value of the weights, with which a factor is 1."""
        return 1.0 - self.offset

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if wide == x.dtype or torch.compiler.is_compiling():  # the compiler chooses what it keeps
            bias = None if self.bias is None else self.bias.to(wide)
            return self._scaled(x.to(wide), self.weight.to(wide), bias).to(x.dtype)
        return _InFloat32.apply(x, self.weight, self.bias, self._scaled)

    def _scaled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._normalize(x, weight + self.offset if self.offset else weight, bias)

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class RMSNorm(Norm):
    """``x / sqrt(mean(x**2) + eps) * weight + bias`` over the last dim (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        kernels = row_kernels(x) if self.bias is None else None
        if kernels is None:
            return super().forward(x)
        return kernels.rms_norm(x, self.weight, self.eps, self.offset)

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if cpu_norm.takes(x):
            out = cpu_norm.rms_norm(x, weight, self.eps)
        else:
            out = F.rms_norm(x, weight.shape, weight, self.eps)
        return out if bias is None else out + bias


class LayerNorm(Norm):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dim (arXiv 1607.06450)."""

    def _normalize(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class _InFloat32(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        normalize: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.normalize = normalize
        return normalize(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = [tensor for tensor in ctx.saved_tensors if tensor is not None]
        inputs = [tensor.float().detach().requires_grad_() for tensor in given]
        with torch.enable_grad():
            out = ctx.normalize(*inputs, *[None] * (3 - len(inputs)))
        found = torch.autograd.grad(out, inputs, grad.float())
        grads = [each.to(tensor.dtype) for each, tensor in zip(found, given, strict=True)]
        return (*grads, *[None] * (4 - len(grads)))


def build_norm(width: int, cfg: NormConfig) -> Norm:
    """Make the norm that the recipe's ``model.norm`` declares."""
    kinds = {NormKind.rmsnorm: RMSNorm, NormKind.layernorm: LayerNorm}
    return kinds[cfg.kind](width, cfg.eps, cfg.zero_centered, cfg.bias)
