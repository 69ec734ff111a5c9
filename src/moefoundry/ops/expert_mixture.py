"""Mixture of SwiGLU experts in one function for CPUs: one expert at a time, in buffers that fit a cache.

The mixture by rows allocates a dozen tensors of N = T * K rows. On a CPU, tensors of 32 MiB and more are mapped from
the system and cleared at each call, since glibc does not keep them; that costs time (smaller ones do not). Here the
rows of one expert are gathered, multiplied and added to the output before the next expert begins, and only the two
inputs of SwiGLU are kept. The gradient of a top-k weight is taken before ``down``, where rows are F wide, so that
outputs of experts are not needed again. A token occurs at most once among an expert's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer, expert_of_row
from moefoundry.ops.grouped_linear import grouped_linear_loop
from moefoundry.ops.permute import RowOrder, permute_reference, sum_rows_reference
from moefoundry.ops.swiglu import swiglu_reference

aten = torch.ops.aten
PAYS_FROM_BYTES = 32 << 20
"""Size of one [N, D] tensor from which this is faster than the mixture by rows, whatever the experts."""
LARGE_GROUPS_BYTES, LARGE_GROUP = 8 << 20, 512
"""The same where an expert has at least so many rows."""


def pays(num_rows: int, num_experts: int, width: int, itemsize: int) -> bool:
    """Tell if :func:`expert_mixture` is faster than the mixture by rows, for N rows of D elements."""
    large = num_rows >= LARGE_GROUP * num_experts
    return num_rows * width * itemsize >= (LARGE_GROUPS_BYTES if large else PAYS_FROM_BYTES)


def expert_mixture(
    tokens_TD: Tensor, weights_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, order: RowOrder
) -> Tensor:
    """Compute each token's weighted sum of its experts' SwiGLU, [T, D] -> [T, D].

    Args:
        tokens_TD: Tokens on the CPU, any float dtype.
        weights_TK: Top-k weights; cast to the dtype of the tokens.
        gate_EFD: Weights of the experts, each in the layout of ``nn.Linear``; likewise the others.
        up_EFD: [E, F, D].
        down_EDF: [E, D, F].
        order: Order of the slots that have rows, from :func:`~moefoundry.ops.permute.order_by_expert`.
    """
    return _ExpertMixture.apply(tokens_TD, weights_TK.to(tokens_TD.dtype), gate_EFD, up_EFD, down_EDF, order)


def expert_mixture_reference(
    tokens_TD: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    order: RowOrder,
    hidden: HiddenLayer = PLAIN_LAYER,
) -> Tensor:
    """Compute :func:`expert_mixture` from the plain references, by autograd; with biases and other activations, too."""
    counts_E = order.tokens_per_expert_E
    rows_ND = permute_reference(tokens_TD, order)
    gate_NF, up_NF = (grouped_linear_loop(rows_ND, weight, counts_E) for weight in (gate_EFD, up_EFD))
    if hidden.gate_bias_EF is not None and hidden.up_bias_EF is not None:
        experts_N = expert_of_row(order)
        gate_NF, up_NF = gate_NF + hidden.gate_bias_EF[experts_N], up_NF + hidden.up_bias_EF[experts_N]
    hidden_NF = swiglu_reference(gate_NF, up_NF, weights_TK.flatten()[order.slot_of_row_N], hidden.activation)
    rows_ND = grouped_linear_loop(hidden_NF, down_EDF, counts_E)
    return sum_rows_reference(rows_ND, order)


class _ExpertMixture(Function):
    @staticmethod
    def forward(
        ctx: Any, tokens_TD: Tensor, weights_TK: Tensor, gate: Tensor, up: Tensor, down: Tensor, order: RowOrder
    ) -> Tensor:
        counts = order.tokens_per_expert_E.tolist()
        hidden_size = gate.shape[1]
        gate_NF, up_NF = (tokens_TD.new_empty(weights_TK.numel(), hidden_size) for _ in range(2))
        out_TD = torch.zeros_like(tokens_TD)
        token_N = order.token_of_row_N
        weight_N1 = weights_TK.flatten()[order.slot_of_row_N].unsqueeze(1)
        x, y = _buffers(2, counts, tokens_TD)
        (h,) = _buffers(1, counts, gate_NF)
        for e, rows in _experts(counts):
            n = rows.stop - rows.start
            x_nD = torch.index_select(tokens_TD, 0, token_N[rows], out=x[:n])
            g_nF = torch.mm(x_nD, gate[e].T, out=gate_NF[rows])
            u_nF = torch.mm(x_nD, up[e].T, out=up_NF[rows])
            h_nF = aten.silu.out(g_nF, out=h[:n]).mul_(u_nF).mul_(weight_N1[rows])
            _add_rows(out_TD, token_N[rows], torch.mm(h_nF, down[e].T, out=y[:n]))
        slot_N = order.slot_of_row_N
        ctx.save_for_backward(tokens_TD, gate, up, down, gate_NF, up_NF, weight_N1, token_N, slot_N)
        ctx.counts, ctx.slots = counts, weights_TK.shape
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        tokens_TD, gate, up, down, gate_NF, up_NF, weight_N1, token_N, slot_N = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        grad_tokens_TD = torch.zeros_like(tokens_TD)
        grad_gate, grad_up, grad_down = (torch.empty_like(weight) for weight in (gate, up, down))
        grad_weight_N = weight_N1.new_empty(len(weight_N1))
        x, dy, dx = _buffers(3, ctx.counts, tokens_TD)
        silu, h, dh, dg = _buffers(4, ctx.counts, gate_NF)
        for e, count in enumerate(ctx.counts):
            if count == 0:
                for grad in (grad_gate, grad_up, grad_down):
                    grad[e].zero_()
        for e, rows in _experts(ctx.counts):
            n, ids, weight_n1 = rows.stop - rows.start, token_N[rows], weight_N1[rows]
            x_nD = torch.index_select(tokens_TD, 0, ids, out=x[:n])
            dy_nD = torch.index_select(grad_TD, 0, ids, out=dy[:n])
            silu_nF = aten.silu.out(gate_NF[rows], out=silu[:n])
            h_nF = torch.mul(silu_nF, up_NF[rows], out=h[:n])
            dh_nF = torch.mm(dy_nD, down[e], out=dh[:n])
            torch.sum(torch.mul(h_nF, dh_nF, out=dg[:n]), dim=1, out=grad_weight_N[rows])
            torch.mm(dy_nD.T, h_nF.mul_(weight_n1), out=grad_down[e])
            dh_nF.mul_(weight_n1)
            du_nF = silu_nF.mul_(dh_nF)
            dg_nF = aten.silu_backward.grad_input(dh_nF.mul_(up_NF[rows]), gate_NF[rows], grad_input=dg[:n])
            torch.mm(dg_nF.T, x_nD, out=grad_gate[e])
            torch.mm(du_nF.T, x_nD, out=grad_up[e])
            dx_nD = torch.mm(dg_nF, gate[e], out=dx[:n]).addmm_(du_nF, up[e])
            _add_rows(grad_tokens_TD, ids, dx_nD)
        grad_weights_TK = weight_N1.new_zeros(ctx.slots)
        grad_weights_TK.view(-1)[slot_N] = grad_weight_N
        return grad_tokens_TD, grad_weights_TK, grad_gate, grad_up, grad_down, None


def _experts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and their slice."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


def _add_rows(out_TD: Tensor, tokens_n: Tensor, rows_nD: Tensor) -> None:
    """Add rows to those of their tokens. ``index_add_`` has the same result, and takes many times as long."""
    out_TD.scatter_add_(0, tokens_n.unsqueeze(1).expand_as(rows_nD), rows_nD)


def _buffers(number: int, counts: list[int], like: Tensor) -> list[Tensor]:
    """Allocate buffers for the rows of the busiest expert, as wide as ``like``."""
    return [like.new_empty(max(counts, default=0), like.shape[1]) for _ in range(number)]
