"""Put token rows in expert order and back.

Both directions, forward and backward, are gathers (with a sum over K), never scatter-adds: no atomics, so two runs
give the same bits, and no zero-filled buffers. The sum over K is one ``embedding_bag``, which reads each row once.

A *slot* is one routed (token, choice) pair, numbered ``t * K + k``; a *row* is its position in expert order.
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
    """The bijection between slots and rows.

    Attributes:
        slot_of_row_N: int64 [N]; ascending within an expert, so the order is stable.
        row_of_slot_TK: int64 [T, K]; the inverse.
        tokens_per_expert_E: int64 [E]; rows of each expert, summing to N.
    """

    slot_of_row_N: Tensor
    row_of_slot_TK: Tensor
    tokens_per_expert_E: Tensor

    @property
    def token_of_row_N(self) -> Tensor:
        """int64 [N]: which token each row holds."""
        return self.slot_of_row_N // self.row_of_slot_TK.shape[1]

    def inverse(self) -> RowOrder:
        """Of an order with K = 1: takes the rows back to where they came from."""
        assert self.row_of_slot_TK.shape[1] == 1, "a token with several rows has no one place to go back to"
        return RowOrder(self.row_of_slot_TK.flatten(), self.slot_of_row_N.unsqueeze(1), self.tokens_per_expert_E)


def order_by_expert(topk_expert_ids_TK: Tensor, num_experts: int) -> RowOrder:
    """Sort slots by expert, stably.

    Args:
        topk_expert_ids_TK: Integer [T, K] in [0, num_experts).
        num_experts: E.
    """
    ids_N = topk_expert_ids_TK.flatten()
    slot_of_row_N = torch.argsort(ids_N.to(torch.int32), stable=True)
    row_of_slot_N = torch.empty_like(slot_of_row_N)
    row_of_slot_N[slot_of_row_N] = torch.arange(ids_N.numel(), device=ids_N.device)
    tokens_per_expert_E = count_by_expert(ids_N, num_experts)
    return RowOrder(slot_of_row_N, row_of_slot_N.view_as(topk_expert_ids_TK), tokens_per_expert_E)


def count_by_expert(expert_ids: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how often each expert occurs in ``expert_ids`` (integers of any shape)."""
    ids = expert_ids.flatten().long()
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=num_experts)
    # on a GPU bincount waits for the host
    return torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def permute(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """[T, D] -> [N, D]: a copy of each token for each of its slots, in expert order."""
    return _Permute.apply(tokens_TD, order)


def unpermute(rows_ND: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    """[N, D] -> [T, D]: the weighted sum over each token's K rows.

    Args:
        rows_ND: Rows in expert order.
        weights_TK: [T, K]; cast to the dtype of the rows.
        order: What :func:`permute` used.
    """
    return _Unpermute.apply(rows_ND, weights_TK.to(rows_ND.dtype), order)


def permute_reference(tokens_TD: Tensor, order: RowOrder) -> Tensor:
    """:func:`permute` by plain indexing."""
    return tokens_TD[order.token_of_row_N]


def unpermute_reference(rows_ND: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
    """:func:`unpermute` by plain indexing."""
    return (rows_ND[order.row_of_slot_TK] * weights_TK.to(rows_ND.dtype).unsqueeze(-1)).sum(dim=1)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return tokens_TD.index_select(0, order.token_of_row_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return F.embedding_bag(ctx.order.row_of_slot_TK, grad_ND, mode="sum"), None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(rows_ND, weights_TK)
        return F.embedding_bag(order.row_of_slot_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_ND, weights_TK = ctx.saved_tensors
        order: RowOrder = ctx.order
        grad_ND = grad_TD.index_select(0, order.token_of_row_N)
        dot_N = torch.bmm(grad_ND.unsqueeze(1), rows_ND.unsqueeze(2)).flatten()
        grad_weights_TK = dot_N[order.row_of_slot_TK]
        weights_N = weights_TK.flatten()[order.slot_of_row_N]
        return grad_ND.mul_(weights_N.unsqueeze(-1)), grad_weights_TK, None
