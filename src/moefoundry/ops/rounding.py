"""Emulate a narrow matrix product on hardware that has none: round the operands, multiply in fp32.

A linear layer has three products and each takes two operands: x and W forward; dY and W, dY and x backward.
``round_operand`` rounds x and W (gradients pass through), ``round_gradient`` rounds dY, so
``round_gradient(f(round_operand(x), round_operand(w)))`` rounds the operands of all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def round_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to the values of ``dtype`` and keep its dtype; the gradient is not rounded."""
    return _RoundOperand.apply(x, dtype)


def round_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x``, and round its gradient to the values of ``dtype``."""
    return _RoundGradient.apply(x, dtype)


class _RoundOperand(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _RoundGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None
