"""A product in fp32 of operands that may be narrower, for the router's gate; of float64 in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def wide_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x @ weight.T``, [T, E], in at least fp32; ``x`` is kept for backward as it came, not as its wide copy."""
    return _WideLinear.apply(x_TD, weight_ED)


def widened(x: Tensor) -> Tensor:
    """``x`` in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _WideLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        wide_TD = widened(x_TD)
        return F.linear(wide_TD, weight_ED.to(wide_TD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD, grad_weight_ED = grad_TE @ weight_ED.to(grad_TE.dtype), grad_TE.T @ widened(x_TD)
        return grad_x_TD.to(x_TD.dtype), grad_weight_ED.to(weight_ED.dtype)
