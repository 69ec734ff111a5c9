"""Scale the gradient of a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``, and multiply its gradient by ``factor``."""
    return _ScaleGradient.apply(x, factor)


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
