"""Output head and cross entropy in one function, a chunk of tokens at a time.

All logits of a batch, [T, V] in fp32, are usually the largest tensor of a training step. Here only one chunk of them
exists at a time, and its loss and gradients are computed together (as in Liger Kernel's fused linear cross entropy,
arXiv 2410.10989); so each of the three products is still computed once. Logits are computed in the dtype of the
operands, and cast to fp32 (float64 stays float64) for the softmax. On a GPU one kernel reads narrow logits twice, and
writes their gradient in their place; so a chunk has four times the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.row_kernels import row_kernels
from moefoundry.ops.sizes import CHUNK_TOKENS, KERNEL_CHUNK_TOKENS

IGNORE_INDEX = -100


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    chunk_tokens: int | None = None,
    operand_dtype: torch.dtype | None = None,
    bias_V: Tensor | None = None,
) -> Tensor:
    """Sum ``-log softmax(hidden @ weight.T + bias)[label]`` over tokens, in nats.

    Args:
        hidden_TD: [T, D].
        weight_VD: [V, D], same dtype.
        labels_T: int64 [T]; ``IGNORE_INDEX`` is no label.
        chunk_tokens: Tokens whose logits exist at the same time; None is ``KERNEL_CHUNK_TOKENS`` where the kernel runs,
            else ``CHUNK_TOKENS``.
        operand_dtype: Dtype to which operands of the three products are rounded (``ops/rounding.py``); None does not
            round.
        bias_V: [V], same dtype; added in fp32. None is 0.

    Returns:
        Scalar, fp32 (float64 for float64 operands); divide by the number of labels that are not ignored.
    """
    return linear_cross_entropies(hidden_TD, weight_VD, labels_T, chunk_tokens, operand_dtype, bias_V)[0]


def linear_cross_entropies(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    chunk_tokens: int | None = None,
    operand_dtype: torch.dtype | None = None,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`linear_cross_entropy`, and the summands [T], which have no gradient; 0 where there is no label."""
    if not torch.is_grad_enabled():  # needs_input_grad is true of a parameter even then
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, bias_V, labels_T, chunk_tokens, operand_dtype)


def linear_cross_entropy_reference(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Compute :func:`linear_cross_entropy` from all logits at once."""
    logits_TV = (hidden_TD @ weight_VD.T).to(softmax_dtype(hidden_TD.dtype))
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype of the softmax of logits of ``dtype``: fp32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        chunk_tokens: int | None,
        operand_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=softmax_dtype(hidden_TD.dtype), device=hidden_TD.device)
        losses_T = total.new_empty(labels_T.shape)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden_TD = torch.empty_like(hidden_TD) if want_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=total.dtype) if want_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=total.dtype) if want_bias and bias_V is not None else None
        weight_VD = _rounded(weight_VD, operand_dtype)
        with_gradient = want_hidden or want_weight or want_bias
        fused = bias_V is None and row_kernels(hidden_TD) is not None
        step = chunk_tokens or (KERNEL_CHUNK_TOKENS if fused else CHUNK_TOKENS)
        for start in range(0, hidden_TD.shape[0], step):
            rows = slice(start, start + step)
            hidden = _rounded(hidden_TD[rows], operand_dtype)
            losses, grad_logits = _of_logits(hidden @ weight_VD.T, bias_V, labels_T[rows], with_gradient)
            losses_T[rows] = losses
            total += losses.sum()
            if grad_logits is None:
                continue
            if grad_bias_V is not None:
                grad_bias_V += grad_logits.sum(dim=0)
            grad_logits = _rounded(grad_logits.to(hidden.dtype), operand_dtype)
            if grad_hidden_TD is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden_TD[rows])
            if grad_weight_VD is not None:
                if hidden.dtype == total.dtype:
                    grad_weight_VD.addmm_(grad_logits.T, hidden)
                else:
                    grad_weight_VD += grad_logits.T @ hidden
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD, grad_bias_V)
        ctx.mark_non_differentiable(losses_T)
        return total, losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD * grad.to(grad_hidden_TD.dtype)
        if grad_weight_VD is not None:
            narrow_VD = torch.empty_like(grad_weight_VD, dtype=ctx.weight_dtype)
            grad_weight_VD = torch.mul(grad_weight_VD, grad, out=narrow_VD)  # without a second one in fp32
        if grad_bias_V is not None:
            grad_bias_V = (grad_bias_V * grad).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, grad_bias_V, None, None, None


def _of_logits(
    logits_NV: Tensor, bias_V: Tensor | None, labels_N: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the losses of a chunk, and their gradient in the memory of the logits, or of their fp32 copy."""
    kernels = row_kernels(logits_NV) if bias_V is None else None
    if kernels is not None:
        losses_N = kernels.cross_entropy_(logits_NV, labels_N, with_gradient)
        return losses_N, logits_NV if with_gradient else None
    logits = logits_NV.to(softmax_dtype(logits_NV.dtype))
    del logits_NV  # its memory is free, as the caller has no name for it
    if bias_V is not None:
        logits += bias_V.to(logits.dtype)
    kept_N = labels_N != IGNORE_INDEX
    label_N1 = labels_N.where(kept_N, 0).unsqueeze(1)
    losses_N = -logits.gather(1, label_N1).squeeze(1)
    largest_N1 = logits.amax(dim=1, keepdim=True)
    slopes = torch.softmax(logits, dim=1, out=logits)
    # The largest logit has the probability 1 / sum(exp(logits - largest)), which does not underflow.
    losses_N += (largest_N1 - slopes.amax(dim=1, keepdim=True).log_()).squeeze(1)
    losses_N *= kept_N
    if not with_gradient:
        return losses_N, None
    slopes.scatter_add_(1, label_N1, -torch.ones_like(largest_N1))
    return losses_N, slopes.mul_(kept_N.unsqueeze(1))
