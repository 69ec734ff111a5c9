"""Attention with sinks: a learned logit of each head that the softmax counts in its denominator, and nowhere else.

    p_ij = exp(s_ij) / (exp(sink) + sum_k exp(s_ik))              (gpt-oss, arXiv 2508.10925; Miller, 2023)

Fused kernels know no sinks, but give the logarithm of their own denominator, L_i. With L'_i = log(exp(L_i) + exp(sink))
the output is theirs times exp(L_i - L'_i). Their backward pass takes probabilities exp(s_ij - L_i) and the products of
output and gradient from the tensors that it is given: L' and the scaled output make it exact for the softmax with the
sink. So a sink costs one pass over the output and nothing in the backward pass, and no [S, L] products are kept.

Where there is no such kernel, the sink is one key more, with a value of 0: any kernel computes that, with a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
MASK_ALIGNMENT = 16  # elements, of the rows of a mask in CUDA's kernel


def attend_with_sinks(
    q_BHSd: Tensor,
    k_BGLd: Tensor,
    v_BGLw: Tensor,
    sinks_H: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute scaled dot-product attention with sinks, [B, H, S, w].

    Args:
        q_BHSd: Queries.
        k_BGLd: Keys; G divides H.
        v_BGLw: Values.
        sinks_H: A logit for each head.
        mask: bool [S, L] or [B, 1, S, L], True where a query sees a key; each sees one at least. None is no mask.
        is_causal: Without a mask: query i sees keys up to i.
        scale: Factor of the products; None is ``d ** -0.5``.
    """
    kernel = KERNELS.get(q_BHSd.device.type)
    if kernel is None or not kernel.takes(q_BHSd, v_BGLw):
        return attend_with_sinks_reference(q_BHSd, k_BGLd, v_BGLw, sinks_H, mask, is_causal, scale)
    repeats = q_BHSd.shape[1] // k_BGLd.shape[1]
    if repeats > 1:
        k_BGLd, v_BGLw = (x.repeat_interleave(repeats, dim=1) for x in (k_BGLd, v_BGLw))
    return _WithSinks.apply(q_BHSd, k_BGLd, v_BGLw, sinks_H, mask, is_causal, scale, kernel)


def attend_with_sinks_reference(
    q_BHSd: Tensor,
    k_BGLd: Tensor,
    v_BGLw: Tensor,
    sinks_H: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute :func:`attend_with_sinks` with a key more, in an element more of the heads, by plain attention."""
    scale = scale or q_BHSd.shape[-1] ** -0.5
    shape = q_BHSd.shape[-2], k_BGLd.shape[-2]
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=q_BHSd.device)
        mask = mask.tril() if is_causal else mask
    logits_1H11 = (sinks_H / scale).to(q_BHSd.dtype).view(1, -1, 1, 1)
    q = torch.cat([q_BHSd, logits_1H11.expand(*q_BHSd.shape[:-1], 1)], dim=-1)
    k = F.pad(F.pad(k_BGLd, (0, 1)), (0, 0, 0, 1))
    k[..., -1, -1] = 1
    v = F.pad(v_BGLw, (0, 0, 0, 1))
    grouped = q.shape[1] != k.shape[1]
    mask = F.pad(mask, (0, 1), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


class Kernel(NamedTuple):
    """A fused kernel of attention.

    Attributes:
        takes: ``(q, v)`` -> True if it computes such tensors.
        forward: ``(q, k, v, bias, is_causal, scale)`` -> output, logarithm of the denominators, what backward wants.
        backward: ``(grad, q, k, v, bias, output, logarithm, what forward gave, is_causal, scale)`` -> gradients.
    """

    takes: Callable[[Tensor, Tensor], bool]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


def _cpu_takes(q: Tensor, v: Tensor) -> bool:
    return q.shape[-1] == v.shape[-1]


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logs: Tensor,
    given: tuple[Tensor, ...],
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, logs, 0.0, is_causal, attn_mask=bias, scale=scale
    )


def _cuda_takes(q: Tensor, v: Tensor) -> bool:
    whole = 16 // q.itemsize  # of 16 bytes
    return q.dtype != torch.float64 and not (q.shape[-1] % whole or v.shape[-1] % whole)


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_efficient_attention(q, k, v, _aligned(bias, q), True, 0.0, is_causal, scale=scale)


def _cuda_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logs: Tensor,
    given: tuple[Tensor, ...],
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...]:
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _aligned(bias, q), out, logs, *given, 0.0, wanted, is_causal, scale=scale
    )[:3]


def _aligned(bias: Tensor | None, q_BHSd: Tensor) -> Tensor | None:
    """Give a bias the four dims that CUDA's kernel wants, and rows that begin at whole 32 bytes."""
    if bias is None:
        return None
    length = bias.shape[-1]
    padded = F.pad(bias, (0, -length % MASK_ALIGNMENT))[..., :length]
    return padded.expand(*q_BHSd.shape[:2], *padded.shape[-2:])


KERNELS = {
    "cpu": Kernel(_cpu_takes, _cpu_forward, _cpu_backward),
    "cuda": Kernel(_cuda_takes, _cuda_forward, _cuda_backward),
}


class _WithSinks(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        kernel: Kernel,
    ) -> Tensor:
        out, logs, *given = kernel.forward(q, k, v, _bias(mask, q), is_causal, scale)
        sinks_H1 = sinks_H.to(logs.dtype).unsqueeze(-1)
        whole = torch.logaddexp(logs, sinks_H1)  # [B, H, S], or longer by what the kernel pads
        out = out * (logs - whole).exp()[..., : q.shape[-2], None].to(out.dtype)
        ctx.save_for_backward(q, k, v, sinks_H, mask, out, whole, *given)
        ctx.is_causal, ctx.scale, ctx.kernel = is_causal, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, mask, out, whole, *given = ctx.saved_tensors
        grads = ctx.kernel.backward(grad, q, k, v, _bias(mask, q), out, whole, given, ctx.is_causal, ctx.scale)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            products_BHS = (grad * out).sum(-1, dtype=whole.dtype)
            shares_BHS = (sinks_H.to(whole.dtype).unsqueeze(-1) - whole[..., : q.shape[-2]]).exp()
            grad_sinks = -(shares_BHS * products_BHS).sum((0, 2)).to(sinks_H.dtype)
        return *grads, grad_sinks, None, None, None, None


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Write a mask as what is added to the products."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
