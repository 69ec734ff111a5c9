"""Bring each token's rows to its experts and the results back.

A dispatcher is the only part of the layer that knows where experts live. All of them share one interface, and what
``dispatch`` has to remember for ``combine`` travels in a frozen :class:`DispatchMetadata`, not in the dispatcher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moefoundry.ops.permute import RowOrder, order_by_expert, permute, unpermute


@dataclass(frozen=True)
class DispatchMetadata:
    """What ``combine`` needs to undo ``dispatch``.

    Attributes:
        order: The local reorder of this rank's slots.
        tokens_per_local_expert: int64 [num_local_experts]; how the R received rows split.
    """

    order: RowOrder
    tokens_per_local_expert: Tensor


class TokenDispatcher(Protocol):
    """What the layer asks of a dispatcher."""

    def dispatch(self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor) -> tuple[Tensor, DispatchMetadata]:
        """[T, D] -> [R, D] rows in the order of this rank's experts."""
        ...

    def combine(self, rows_RD: Tensor, topk_weights_TK: Tensor, metadata: DispatchMetadata) -> Tensor:
        """[R, D] -> [T, D], the weighted sum over each token's experts."""
        ...


class LocalDispatcher:
    """All experts are on this rank: dispatch is a permutation."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor) -> tuple[Tensor, DispatchMetadata]:
        order = order_by_expert(topk_expert_ids_TK, self.num_experts)
        return permute(tokens_TD, order), DispatchMetadata(order, order.tokens_per_expert_E)

    def combine(self, rows_RD: Tensor, topk_weights_TK: Tensor, metadata: DispatchMetadata) -> Tensor:
        return unpermute(rows_RD, topk_weights_TK, metadata.order)
