"""Put token rows in expert order and back.

Both directions, forward and backward, are gathers (with a sum over K), not scatter-adds: they need no atomics, so that
two runs give the same bits, and no zero-filled buffers. The sum over K is one ``embedding_bag``, which reads each row
once. Only gradients of slots, one number each, are scattered, each to a place of its own.

A *slot* is one routed (token, choice) pair, numbered ``t * K + k``; a *row* is its position in expert order. Slots that
are not kept (capacity, or another node's experts) have no row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.kernel_choice import NARROW, kernels_run

MAX_EXPERTS = 1024
"""Experts that the kernels of ``order_kernel.py`` take."""


@dataclass(frozen=True)
class RowOrder:
    """Bijection between (kept) slots and rows.

    Attributes:
        slot_of_row_N: int64 [N], slot of each row; ascending within an expert.
        row_of_kept_slot_N: int64 [N], the inverse: rows in the order of their slots.
        first_of_token: int64 [T + 1], index in ``row_of_kept_slot_N`` of each token's first row; the last is N.
        tokens_per_expert_E: int64 [E], rows of each expert; sums to N.
        top_k: K.
    """

    slot_of_row_N: Tensor
    row_of_kept_slot_N: Tensor
    first_of_token: Tensor
    tokens_per_expert_E: Tensor
    top_k: int

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the attributes: what an operator of torch can take."""
        return [self.slot_of_row_N, self.row_of_kept_slot_N, self.first_of_token, self.tokens_per_expert_E]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor], top_k: int) -> RowOrder:
        """Make it again from :attr:`tensors` and K."""
        slot_of_row_N, row_of_kept_slot_N, first_of_token, tokens_per_expert_E = tensors
        return cls(slot_of_row_N, row_of_kept_slot_N, first_of_token, tokens_per_expert_E, top_k)

    @property
    def token_of_row_N(self) -> Tensor:
        """Token of each row, int64 [N]."""
        return self.slot_of_row_N // self.top_k if self.top_k > 1 else self.slot_of_row_N


def order_by_expert(
    topk_expert_ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, num_kept: int | None = None
) -> RowOrder:
    """Sort slots by expert, stably.

    Args:
        topk_expert_ids_TK: Integer [T, K] in [0, num_experts).
        num_experts: E.
        kept_TK: bool [T, K], slots that get a row; None keeps all.
        num_kept: Number of kept slots; None makes the host wait for the device to count them.
    """
    ids, top_k = topk_expert_ids_TK.flatten(), topk_expert_ids_TK.shape[1]
    num_rows = len(ids) if kept_TK is None else num_kept
    if num_rows is not None and len(ids) and num_experts <= MAX_EXPERTS and kernels_run(ids.device):
        from moefoundry.ops.order_kernel import order_slots

        kept = None if kept_TK is None else kept_TK.flatten()
        return RowOrder.from_tensors(order_slots(ids, num_experts, top_k, kept, num_rows), top_k)
    if kept_TK is None:
        slot_of_row_N = order_N = _argsort(ids)
        first_of_token = torch.arange(0, len(ids) + 1, top_k, device=ids.device)
    else:
        kept = kept_TK.flatten()
        slots_N = (kept.nonzero() if num_kept is None else kept.nonzero_static(size=num_kept)).flatten()
        ids = ids[slots_N]
        order_N = _argsort(ids)
        slot_of_row_N = slots_N[order_N]
        first_of_token = F.pad(kept_TK.sum(dim=1).cumsum(0), (1, 0))
    row_of_kept_slot_N = torch.empty_like(order_N)
    row_of_kept_slot_N[order_N] = torch.arange(len(order_N), device=ids.device)
    counts_E = count_by_expert(ids, num_experts)
    return RowOrder(slot_of_row_N, row_of_kept_slot_N, first_of_token, counts_E, top_k)


def _argsort(ids: Tensor) -> Tensor:
    return torch.argsort(ids.to(torch.int32), stable=True)


def count_by_expert(expert_ids: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """Count each expert in ``expert_ids`` (integers of any shape), or among those ``kept``; int64 [E]."""
    if kept is not None:
        return count_by_expert(expert_ids.where(kept, num_experts), num_experts + 1)[:-1]
    ids = expert_ids.flatten().long()
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=num_experts)
    # on a GPU bincount waits for the host
    return torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def pad_order(order: RowOrder, num_tokens: int, block: int) -> RowOrder:
    """Fill each expert's rows up to whole blocks of ``block`` rows, with rows of one token more.

    That token, number ``num_tokens``, is for the caller to append, as zeros. It has no slot whose row is kept: its rows
    are read by nothing, and get no gradient.

    Args:
        order: Rows without gaps.
        num_tokens: T.
        block: Rows of a block.

    Returns:
        An order of T + 1 tokens, of which ``tokens_per_expert_E`` counts whole blocks. It has as many rows as can be
        needed, which the host knows; the last may be of no expert.
    """
    counts_E, rows = order.tokens_per_expert_E, len(order.slot_of_row_N)
    padded_E = (counts_E + block - 1) // block * block
    ends_E = counts_E.cumsum(0)
    shift_E = (padded_E.cumsum(0) - padded_E) - (ends_E - counts_E)
    row_N = torch.arange(rows, device=counts_E.device)
    place_N = row_N + shift_E[torch.searchsorted(ends_E, row_N, right=True)]
    size = (rows // block + min(len(counts_E), rows)) * block
    slot_of_place = order.slot_of_row_N.new_full((size,), num_tokens * order.top_k)
    return RowOrder(
        slot_of_row_N=slot_of_place.index_copy(0, place_N, order.slot_of_row_N),
        row_of_kept_slot_N=place_N[order.row_of_kept_slot_N],
        first_of_token=F.pad(order.first_of_token, (0, 1), value=rows),
        tokens_per_expert_E=padded_E,
        top_k=order.top_k,
    )


def permute(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """Copy each token to the rows of its (kept) slots, in expert order, [T, D] -> [N, D]."""
    return _Permute.apply(tokens_TD, order)


def sum_rows(rows_ND: Tensor, order: RowOrder) -> Tensor:
    """Sum the rows of each token's (kept) slots, [N, D] -> [T, D]; keeps no rows for the backward pass."""
    return _SumRows.apply(rows_ND, order)


def place_rows(rows_ND: Tensor, place_N: Tensor, size: int) -> Tensor:
    """Copy rows [N, D] to their places in zeros, [size, D].

    It saves no tensor for the backward pass, so that a block of a micro-batch with padding ends where one without does
    (``ops/recompute.py``): ranks may have either, and exchange the same.
    """
    return _PlaceRows.apply(rows_ND, place_N, size)


def permute_slots(values_TK: Tensor, order: RowOrder) -> Tensor:
    """Gather the values of the slots that have rows, in expert order, [T, K] -> [N]."""
    return values_TK.flatten().index_select(0, order.slot_of_row_N)


def permute_reference(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """Compute :func:`permute` by plain indexing."""
    return tokens_TD[order.token_of_row_N]


def sum_rows_reference(rows_ND: Tensor, order: RowOrder) -> Tensor:
    """Compute :func:`sum_rows` by plain indexing."""
    num_tokens = len(order.first_of_token) - 1
    return rows_ND.new_zeros(num_tokens, rows_ND.shape[1]).index_add(0, order.token_of_row_N, rows_ND)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return gather_rows(tokens_TD, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return sum_of_rows(grad_ND, ctx.order), None


class _SumRows(Function):
    """The transpose of :class:`_Permute`."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return sum_of_rows(rows_ND, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad_TD, ctx.order), None


class _PlaceRows(Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, place_N: Tensor, size: int) -> Tensor:
        ctx.place_N = place_N
        return rows_ND.new_zeros(size, *rows_ND.shape[1:]).index_copy_(0, place_N, rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.place_N), None, None


def gather_rows(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """Compute :func:`permute`, not differentiable, for rows of any shape and dtype."""
    return tokens_TD.index_select(0, order.token_of_row_N)


def sum_of_rows(rows_ND: Tensor, order: RowOrder) -> Tensor:
    """Compute :func:`sum_rows`, not differentiable."""
    if not len(rows_ND):
        return rows_ND.new_zeros(len(order.first_of_token) - 1, rows_ND.shape[1])
    if rows_ND.dtype in NARROW and kernels_run(rows_ND.device):
        from moefoundry.ops.fused_experts import launches  # which imports this module

        return launches.sum_rows(rows_ND.contiguous(), order)
    rows_by_token, first = order.row_of_kept_slot_N, order.first_of_token
    return F.embedding_bag(rows_by_token, rows_ND, first, mode="sum", include_last_offset=True)
