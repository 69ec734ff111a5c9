"""Causal attention on a CPU, some queries at a time, as batched products of all heads.

Torch's flash kernel for CPUs wants values as wide as keys: MLA's are narrower, and the kernel's substitute makes the
probabilities of all queries, [H, S, S], and keeps them for the backward pass. Here those of ``QUERIES`` queries exist
at a time, and the backward pass computes them again. Of equal widths, too, some lengths are faster this way than by the
flash kernel, which takes less memory (``docs/performance.md``).

The heads that share keys are one matrix of queries, so keys are read once for all of them. The softmax subtracts the
largest product, as every kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
QUERIES, LONG_QUERIES, LONG = 64, 128, 1024
"""Queries of a block, of a sequence shorter than ``LONG`` and of others."""
SHORTEST = 256
"""Length from which this is faster than operators, where values have another width than keys."""
EQUAL = range(384, 513)
"""Lengths for which this is faster than the flash kernel, where values are as wide as keys."""


def takes(q_BHSd: Tensor, k_BGLd: Tensor, v_BGLw: Tensor) -> bool:
    """Tell if :func:`cpu_attention` computes these tensors, and trains faster than torch's kernels.

    Without gradients it does not, so that results of an evaluation depend on no other sequence of a batch.
    """
    if q_BHSd.device.type != "cpu" or q_BHSd.dtype not in (torch.float32, torch.float64):
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or q_BHSd.shape[2] != k_BGLd.shape[2]:
        return False
    if not (q_BHSd.numel() and v_BGLw.numel()):
        return False
    length = q_BHSd.shape[2]
    if q_BHSd.shape[-1] == v_BGLw.shape[-1]:
        return length in EQUAL
    return length >= SHORTEST


def cpu_attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSw: Tensor, scale: float | None = None) -> Tensor:
    """Compute causal scaled dot-product attention, [B, S, H, w].

    Args:
        q_BHSd: Queries, fp32 or float64, on the CPU.
        k_BGSd: Keys; G divides H, and key head g is for the query heads from g * H / G on.
        v_BGSw: Values, maybe of another width.
        scale: Factor of the products; None is ``d ** -0.5``.
    """
    scale = q_BHSd.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = FORWARD(q_BHSd, k_BGSd, v_BGSw, scale)
    return out


def cpu_attention_reference(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSw: Tensor, scale: float | None = None) -> Tensor:
    """Compute :func:`cpu_attention` from the probabilities of all queries."""
    out = F.scaled_dot_product_attention(q_BHSd, k_BGSd, v_BGSw, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def forward(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSw: Tensor, scale: float) -> Tensor:
    """Compute the output, [B, S, H, w]."""
    heads = _Heads(q_BHSd, k_BGSd, v_BGSw, scale)
    out_BSHw = q_BHSd.new_empty(*heads.batch_and_length, q_BHSd.shape[1], v_BGSw.shape[-1])
    out_BGRSw = heads.grouped(out_BSHw.transpose(1, 2))
    for rows in heads.blocks():
        probabilities = heads.probabilities(heads.matrices(heads.q_BGRSd[:, :, :, rows]), rows)
        found = torch.bmm(probabilities, heads.v[:, : rows.stop])
        out_BGRSw[:, :, :, rows] = found.view(out_BGRSw[:, :, :, rows].shape)
    return out_BSHw


def backward(
    grad_BSHw: Tensor, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSw: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values; those of queries in the memory of [B, S, H, d]."""
    heads = _Heads(q_BHSd, k_BGSd, v_BGSw, scale)
    grad_BGRSw = heads.grouped(grad_BSHw.transpose(1, 2))
    grad_q_BSHd = q_BHSd.new_empty(*heads.batch_and_length, *q_BHSd.shape[1::2])
    grad_q_BGRSd = heads.grouped(grad_q_BSHd.transpose(1, 2))
    grad_k, grad_v = (x.new_zeros(x.shape) for x in (heads.k, heads.v))
    buffer = torch.empty_like(heads.buffer)
    sums = grad_k.new_empty(max(grad_k.numel(), grad_v.numel()))
    for rows in heads.blocks():
        keys = slice(rows.stop)
        queries, grads = (heads.matrices(x[:, :, :, rows]) for x in (heads.q_BGRSd, grad_BGRSw))
        probabilities = heads.probabilities(queries, rows)
        _add_product(grad_v[:, keys], probabilities.mT, grads, sums)
        slopes = torch.bmm(grads, heads.v[:, keys].mT, out=_part(buffer, probabilities.shape))
        aten._softmax_backward_data.out(slopes, probabilities, -1, slopes.dtype, grad_input=slopes)
        found = torch.bmm(slopes, heads.k[:, keys])
        grad_q_BGRSd[:, :, :, rows] = found.view(grad_q_BGRSd[:, :, :, rows].shape)
        _add_product(grad_k[:, keys], slopes.mT, queries, sums)
    return grad_q_BSHd.transpose(1, 2), grad_k.mul_(scale).view(k_BGSd.shape), grad_v.view(v_BGSw.shape)


FORWARD = torch.library.custom_op("moefoundry::cpu_attention", forward, mutates_args=())
BACKWARD = torch.library.custom_op("moefoundry::cpu_attention_backward", backward, mutates_args=())
OPERATOR = torch.ops.moefoundry.cpu_attention.default
"""The forward pass as an operator of torch, whose result selective activation checkpointing keeps."""


@FORWARD.register_fake
def _(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSw: Tensor, scale: float) -> Tensor:
    batch, heads, length, _ = q_BHSd.shape
    return q_BHSd.new_empty(batch, length, heads, v_BGSw.shape[-1])


@BACKWARD.register_fake
def _(grad_BSHw: Tensor, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSw: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_q_BSHd = q_BHSd.transpose(1, 2).new_empty(q_BHSd.transpose(1, 2).shape)
    return grad_q_BSHd.transpose(1, 2), k_BGSd.new_empty(k_BGSd.shape), v_BGSw.new_empty(v_BGSw.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, grad_BSHw: Tensor) -> tuple[Tensor | None, ...]:
    return *BACKWARD(grad_BSHw, *ctx.saved_tensors, ctx.scale), None


FORWARD.register_autograd(_backward, setup_context=_save)


class _Heads:
    """Queries, keys and values as batches of B * G matrices, in each the R = H / G heads of queries that share keys.

    Attributes:
        q_BGRSd: Queries.
        k: Keys times the scale, [B * G, S, d].
        v: Values, [B * G, S, w].
        buffer: Memory of the probabilities of a block.
    """

    def __init__(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSw: Tensor, scale: float) -> None:
        self.k, self.v = (k_BGSd * scale).flatten(0, 1), v_BGSw.flatten(0, 1)
        self.key_heads = k_BGSd.shape[1]
        self.q_BGRSd = self.grouped(q_BHSd)
        batch, heads, self.length, _ = q_BHSd.shape
        self.batch_and_length = batch, self.length
        self.queries = queries = min(LONG_QUERIES if self.length >= LONG else QUERIES, self.length)
        self.buffer = q_BHSd.new_empty(batch * heads * queries * self.length)
        self.future = torch.ones(queries, queries, dtype=torch.bool).triu_(1)

    def grouped(self, x_BHSd: Tensor) -> Tensor:
        """View [B, H, S, d] as [B, G, R, S, d]."""
        return x_BHSd.unflatten(1, (self.key_heads, -1))

    def blocks(self) -> Iterator[slice]:
        """Yield the blocks of queries."""
        for start in range(0, self.length, self.queries):
            yield slice(start, min(start + self.queries, self.length))

    def matrices(self, x_BGRnd: Tensor) -> Tensor:
        """Copy [B, G, R, n, d] to [B * G, R * n, d]."""
        return x_BGRnd.contiguous().view(len(self.k), -1, x_BGRnd.shape[-1])

    def probabilities(self, queries: Tensor, rows: slice) -> Tensor:
        """Compute the softmax of a block's queries, [B * G, R * n, keys up to the block's end], in the buffer."""
        num_keys, n = rows.stop, rows.stop - rows.start
        products = _part(self.buffer, (*queries.shape[:2], num_keys))
        torch.bmm(queries, self.k[:, :num_keys].mT, out=products)
        products.view(-1, n, num_keys)[:, :, rows].masked_fill_(self.future[:n, :n], -torch.inf)
        return torch.softmax(products, -1, out=products)


def _add_product(sums: Tensor, left: Tensor, right: Tensor, buffer: Tensor) -> None:
    """Add batched products to sums that are not contiguous, by way of a buffer.

    ``baddbmm_`` would make a call for each product of the batch, with all threads at each. Where they do not share a
    cache, that takes half as long again.
    """
    sums += torch.bmm(left, right, out=_part(buffer, sums.shape))


def _part(buffer: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """View the middle of a buffer as a tensor of this shape.

    Whatever the size is, both halves meet in one place. So a core that computes one of them finds nothing that the
    other has written.
    """
    size = torch.Size(shape).numel()
    start = (len(buffer) - size) // 2
    return buffer[start : start + size].view(shape)
