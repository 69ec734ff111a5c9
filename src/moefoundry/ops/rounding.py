"""Emulate a narrow matrix product on hardware that has none: round the operands, multiply in fp32.

A linear layer has three products and each takes two operands: x and W forward; dY and W, dY and x backward.
``round_operand`` rounds x and W (gradients pass through), ``round_gradient`` rounds dY, so
``round_gradient(f(round_operand(x), round_operand(w)))`` rounds the operands of all three.

Compiled code rounds in an operator: of two casts that follow each other, a compiler leaves the first out.
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


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to the values of ``dtype`` and keep its dtype, without a gradient."""
    return OPERATOR(x, dtype) if torch.compiler.is_compiling() else _round(x, dtype)


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True).to(x.dtype)  # the result of an operator is never its operand


OPERATOR = torch.library.custom_op("moefoundry::rounded", _round, mutates_args=())


@OPERATOR.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


class _RoundOperand(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded(x, dtype)

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
        return rounded(grad, ctx.dtype), None
