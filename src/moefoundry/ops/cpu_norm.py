"""RMSNorm on a CPU in few passes over memory: torch has a kernel of it for GPUs only.

Its substitute for CPUs runs and keeps each step of the formula by itself. Here the input is read for its norm and
written once, times two factors; the backward pass computes the products of gradient and input once, for the sums of
their rows and of their columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def takes(x: Tensor) -> bool:
    """Tell if :func:`rms_norm` computes this tensor: fp32 or wider, on a CPU, in code that is not compiled."""
    is_wide = torch.promote_types(x.dtype, torch.float32) == x.dtype
    return is_wide and x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute ``x / sqrt(mean(x**2) + eps) * weight`` over the last dim; keeps ``x`` and a number a row for backward.

    Args:
        x: [..., D], fp32 or float64.
        weight_D: Same dtype.
        eps: Added before the root.
    """
    return _RmsNorm.apply(x, weight_D, eps)


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute :func:`rms_norm` by torch's operators."""
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, factor)
        return (x * factor).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, factor = ctx.saved_tensors
        products_ND = (grad * x).reshape(-1, x.shape[-1])
        factor_N = factor.flatten()
        pull_N = torch.mv(products_ND, weight_D).mul_(factor_N.pow(3)).div_(-x.shape[-1])
        grad_weight_D = products_ND.mul_(factor_N.unsqueeze(1)).sum(0)  # in parts: rows are many
        grad_x = (grad * weight_D).mul_(factor).addcmul_(x, pull_N.view(factor.shape))
        return grad_x, grad_weight_D, None
