"""SwiGLU (arXiv 2002.05202) that keeps only its inputs for the backward pass, and computes SiLU again there.

A row may have a weight, that of its expert. It is applied here, where rows are narrowest; then the sum over a token's
experts has no weights, and its backward pass needs none of the experts' outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Compute ``silu(gate) * up``, any shape [..., F] and float dtype; times ``row_weights`` [...], if given."""
    return _SwiGLU.apply(gate, up, row_weights)


def swiglu_reference(gate: Tensor, up: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Compute :func:`swiglu` by autograd."""
    out = F.silu(gate) * up
    return out if row_weights is None else out * row_weights.unsqueeze(-1).to(out.dtype)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, row_weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, row_weights)
        out = F.silu(gate).mul_(up)
        return out if row_weights is None else out.mul_(row_weights.unsqueeze(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return swiglu_backward(grad, *ctx.saved_tensors)


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradients of ``gate``, ``up`` and ``row_weights``."""
    silu, grad_row_weights = F.silu(gate), None
    if row_weights is not None:
        grad_row_weights = (silu * up).mul_(grad).sum(-1, dtype=row_weights.dtype)
        grad = grad * row_weights.unsqueeze(-1).to(grad.dtype)
    return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad), grad_row_weights
