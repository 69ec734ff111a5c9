"""Put token rows in expert order and back.

Both directions, forward and backward, are gathers (with a sum over K), never scatter-adds: no atomics, so two runs
give the same bits, and no zero-filled buffers. The sum over K is one ``embedding_bag``, which reads each row once.

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


@dataclass(frozen=True)
class RowOrder:
    """The bijection between (kept) slots and rows.

    Attributes:
        slot_of_row_N: int64 [N]; ascending within an expert, so the order is stable.
        row_of_slot_TK: int64 [T, K]; the inverse; 0 for slots that are not kept.
        tokens_per_expert_E: int64 [E]; rows of each expert, summing to N.
        kept_TK: bool [T, K]; None keeps all.
    """

    slot_of_row_N: Tensor
    row_of_slot_TK: Tensor
    tokens_per_expert_E: Tensor
    kept_TK: Tensor | None = None

    @property
    def token_of_row_N(self) -> Tensor:
        """int64 [N]: which token each row holds."""
        top_k = self.row_of_slot_TK.shape[1]
        return self.slot_of_row_N // top_k if top_k > 1 else self.slot_of_row_N

    def inverse(self) -> RowOrder:
        """Of an order with K = 1: takes the rows back to where they came from."""
        assert self.row_of_slot_TK.shape[1] == 1, "a token with several rows has no one place to go back to"
        return RowOrder(self.row_of_slot_TK.flatten(), self.slot_of_row_N.unsqueeze(1), self.tokens_per_expert_E)


def order_by_expert(
    topk_expert_ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, num_kept: int | None = None
) -> RowOrder:
    """Sort slots by expert, stably.

    Args:
        topk_expert_ids_TK: Integer [T, K] in [0, num_experts).
        num_experts: E.
        kept_TK: bool [T, K]; slots that get a row. None keeps all.
        num_kept: How many these are, where the host knows; else it waits for the device to tell.
    """
    ids_TK = topk_expert_ids_TK if kept_TK is None else topk_expert_ids_TK.where(kept_TK, num_experts)
    ids_N = ids_TK.flatten()
    slot_of_row_N = torch.argsort(ids_N.to(torch.int32), stable=True)
    row_of_slot_N = torch.empty_like(slot_of_row_N)
    row_of_slot_N[slot_of_row_N] = torch.arange(ids_N.numel(), device=ids_N.device)
    row_of_slot_TK = row_of_slot_N.view_as(ids_TK)
    if kept_TK is None:
        return RowOrder(slot_of_row_N, row_of_slot_TK, count_by_expert(ids_N, num_experts))
    tokens_per_expert_E = count_by_expert(ids_N, num_experts + 1)[:-1]
    if num_kept is None:
        num_kept = int(tokens_per_expert_E.sum())
    return RowOrder(slot_of_row_N[:num_kept], row_of_slot_TK.where(kept_TK, 0), tokens_per_expert_E, kept_TK)


def count_by_expert(expert_ids: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """int64 [E]: how often each expert occurs in ``expert_ids`` (integers of any shape), or among those ``kept``."""
    if kept is not None:
        return count_by_expert(expert_ids.where(kept, num_experts), num_experts + 1)[:-1]
    ids = expert_ids.flatten().long()
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=num_experts)
    # on a GPU bincount waits for the host
    return torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def permute(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """[T, D] -> [N, D]: a copy of each token for each of its (kept) slots, in expert order."""
    return _Permute.apply(tokens_TD, order)


def unpermute(rows_ND: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    """[N, D] -> [T, D]: the weighted sum over the rows of each token's (kept) slots.

    Args:
        rows_ND: Rows in expert order.
        weights_TK: [T, K]; cast to the dtype of the rows.
        order: What :func:`permute` used.
    """
    weights_TK = weights_TK.to(rows_ND.dtype)
    if order.kept_TK is not None:
        weights_TK = weights_TK * order.kept_TK
    return _Unpermute.apply(rows_ND, weights_TK, order)


def permute_reference(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """:func:`permute` by plain indexing."""
    return tokens_TD[order.token_of_row_N]


def unpermute_reference(rows_ND: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    """:func:`unpermute` by plain indexing."""
    weights_TK = weights_TK.to(rows_ND.dtype)
    if order.kept_TK is None:
        return (rows_ND[order.row_of_slot_TK] * weights_TK.unsqueeze(-1)).sum(dim=1)
    token_N, choice_N = order.token_of_row_N, order.slot_of_row_N % order.row_of_slot_TK.shape[1]
    weighted_ND = rows_ND * weights_TK[token_N, choice_N].unsqueeze(-1)
    return rows_ND.new_zeros(len(weights_TK), rows_ND.shape[1]).index_add(0, token_N, weighted_ND)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return tokens_TD.index_select(0, order.token_of_row_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        order: RowOrder = ctx.order
        kept_TK = None if order.kept_TK is None else order.kept_TK.to(grad_ND.dtype)
        return _sum_of_rows(grad_ND, order, kept_TK), None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(rows_ND, weights_TK)
        return _sum_of_rows(rows_ND, order, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows_ND, weights_TK = ctx.saved_tensors
        order: RowOrder = ctx.order
        grad_ND = grad_TD.index_select(0, order.token_of_row_N)
        grad_weights_TK = _dots_of_slots(grad_ND, rows_ND, order) if ctx.needs_input_grad[1] else None
        weights_N = weights_TK.flatten()[order.slot_of_row_N]
        return grad_ND.mul_(weights_N.unsqueeze(-1)), grad_weights_TK, None


def _sum_of_rows(rows_ND: Tensor, order: RowOrder, weights_TK: Tensor | None) -> Tensor:
    """[N, D] -> [T, D]; an absent slot reads row 0, with weight 0."""
    if not len(rows_ND):
        return rows_ND.new_zeros(len(order.row_of_slot_TK), rows_ND.shape[1])
    return F.embedding_bag(order.row_of_slot_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)


def _dots_of_slots(grad_ND: Tensor, rows_ND: Tensor, order: RowOrder) -> Tensor:
    """[T, K]: each slot's inner product of its row and the row's gradient; anything where it has no row."""
    if not len(rows_ND):
        return rows_ND.new_zeros(order.row_of_slot_TK.shape)
    return torch.bmm(grad_ND.unsqueeze(1), rows_ND.unsqueeze(2)).flatten()[order.row_of_slot_TK]
