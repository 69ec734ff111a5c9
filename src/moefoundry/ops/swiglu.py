"""SwiGLU (arXiv 2002.05202) that keeps only its inputs for the backward pass, and computes SiLU again there.

A row may have a weight, that of its expert. It is applied here, where rows are narrowest; then the sum over a token's
experts has no weights, and its backward pass needs none of the experts' outputs.

:class:`Activation` has the constants of variants, such as gpt-oss's clamped one:

    g = min(gate, limit);  u = max(min(up, limit), -limit);  out = g * sigmoid(alpha * g) * (u + offset)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.wide_linear import widened


class Activation(NamedTuple):
    """Constants of a SwiGLU; the defaults are the plain one.

    Attributes:
        alpha: Factor of the gate inside its sigmoid.
        limit: Largest gate, and largest magnitude of up; None clamps nothing.
        offset: Added to up.
    """

    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0


PLAIN = Activation()


def swiglu(gate: Tensor, up: Tensor, row_weights: Tensor | None = None, activation: Activation = PLAIN) -> Tensor:
    """Compute ``silu(gate) * up``, any shape [..., F] and float dtype; times ``row_weights`` [...], if given.

    Another activation is computed in fp32 where the inputs are narrower.
    """
    return _SwiGLU.apply(gate, up, row_weights, activation)


def swiglu_reference(
    gate: Tensor, up: Tensor, row_weights: Tensor | None = None, activation: Activation = PLAIN
) -> Tensor:
    """Compute :func:`swiglu` by autograd."""
    if activation == PLAIN:
        out = F.silu(gate) * up
        return out if row_weights is None else out * row_weights.unsqueeze(-1).to(out.dtype)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    out = gate * torch.sigmoid(activation.alpha * gate) * (up + activation.offset)
    return out if row_weights is None else out * row_weights.unsqueeze(-1).to(out.dtype)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, row_weights: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up, row_weights)
        ctx.activation = activation
        if activation == PLAIN:
            out = F.silu(gate).mul_(up)
        else:
            clamped_gate, clamped_up = _clamped(gate, up, activation)
            gated = (activation.alpha * clamped_gate).sigmoid_().mul_(clamped_gate)
            out = gated.mul_(clamped_up + activation.offset).to(gate.dtype)
        if row_weights is not None:
            out.mul_(row_weights.unsqueeze(-1))
        return out.view_as(out)  # the compiler of torch 2.11 drops the gradient of a result that was written in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gate, up, row_weights = ctx.saved_tensors
        return *swiglu_backward(grad, gate, up, row_weights, ctx.activation), None


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor | None, activation: Activation = PLAIN
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradients of ``gate``, ``up`` and ``row_weights``."""
    if activation != PLAIN:
        return _backward(grad, gate, up, row_weights, activation)
    silu, grad_row_weights = F.silu(gate), None
    if row_weights is not None:
        grad_row_weights = (silu * up).mul_(grad).sum(-1, dtype=row_weights.dtype)
        grad = grad * row_weights.unsqueeze(-1).to(grad.dtype)
    return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad), grad_row_weights


def _clamped(gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Clamp in fp32 or wider, if there is a limit."""
    gate, up, limit = widened(gate), widened(up), activation.limit
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def _parts(gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gated value, its derivative by the gate, and the factor beside it, new tensors in fp32 or wider."""
    gate, up = _clamped(gate, up, activation)
    sigmoid = torch.sigmoid(activation.alpha * gate)
    gated = gate * sigmoid
    return gated, sigmoid + activation.alpha * gated * (1 - sigmoid), up + activation.offset


def _backward(
    grad: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor, Tensor | None]:
    gated, slope, lifted = _parts(gate, up, activation)
    grad, grad_row_weights = widened(grad), None
    if row_weights is not None:
        grad_row_weights = (gated * lifted).mul_(grad).sum(-1, dtype=row_weights.dtype)
        grad = grad * row_weights.unsqueeze(-1)
    grad_gate, grad_up = lifted.mul_(slope).mul_(grad), gated.mul_(grad)
    if activation.limit is not None:
        grad_gate.masked_fill_(gate >= activation.limit, 0)
        grad_up.masked_fill_(up.abs() >= activation.limit, 0)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype), grad_row_weights
