"""Bring each token's rows to its experts and the results back.

A dispatcher is the only part of the layer that knows where experts live. All of them share one interface, and what
``dispatch`` has to remember for ``combine`` travels in a frozen :class:`DispatchMetadata`, not in the dispatcher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.ops.all_to_all import all_to_all_rows
from moefoundry.ops.permute import RowOrder, order_by_expert, permute, unpermute


@dataclass(frozen=True)
class Exchange:
    """How rows cross the ranks of an expert group.

    Attributes:
        send_counts, receive_counts: Rows to and from each rank of the group.
        order: Puts the R received rows, which come by sender, into the order of this rank's experts.
    """

    send_counts: list[int]
    receive_counts: list[int]
    order: RowOrder


@dataclass(frozen=True)
class DispatchMetadata:
    """What ``combine`` needs to undo ``dispatch``.

    Attributes:
        order: The local reorder of this rank's slots, by expert (all E of them).
        tokens_per_local_expert: int64 [num_local_experts]; how the R received rows split.
        exchange: Set where experts live on several ranks.
    """

    order: RowOrder
    tokens_per_local_expert: Tensor
    exchange: Exchange | None = None


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


class AllToAllDispatcher:
    """Experts are divided among the ranks of a group: rank r owns experts ``r * E / size .. (r + 1) * E / size``.

    Dispatch sorts this rank's slots by expert, so that the rows for one rank lie together; the ranks tell each other
    how many rows come (one exchange of counts, and the one time that a layer waits for the host), exchange the rows,
    and sort what they received by local expert. Combine is the same, backwards. A rank may receive nothing, or all.

    Args:
        num_experts: E, a multiple of the group's size.
        group: The ranks of the mesh axis ``expert``.

    Raises:
        ValueError: The group's size does not divide E.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        if num_experts % group.size():
            raise ValueError(f"{num_experts} experts do not divide among {group.size()} ranks")
        self.num_experts = num_experts
        self.group = group

    def dispatch(self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor) -> tuple[Tensor, DispatchMetadata]:
        order = order_by_expert(topk_expert_ids_TK, self.num_experts)
        exchange = self._plan(order.tokens_per_expert_E)
        rows_ND = permute(tokens_TD, order)
        rows_RD = all_to_all_rows(rows_ND, exchange.send_counts, exchange.receive_counts, self.group)
        metadata = DispatchMetadata(order, exchange.order.tokens_per_expert_E, exchange)
        return permute(rows_RD, exchange.order), metadata

    def combine(self, rows_RD: Tensor, topk_weights_TK: Tensor, metadata: DispatchMetadata) -> Tensor:
        exchange = metadata.exchange
        assert exchange is not None, "made by this dispatcher"
        rows_RD = permute(rows_RD, exchange.order.inverse())
        rows_ND = all_to_all_rows(rows_RD, exchange.receive_counts, exchange.send_counts, self.group)
        return unpermute(rows_ND, topk_weights_TK, metadata.order)

    def _plan(self, tokens_per_expert_E: Tensor) -> Exchange:
        """Exchange the counts: with G ranks and L local experts, [G, L] to send becomes [G, L] to receive."""
        send_GL = tokens_per_expert_E.view(self.group.size(), -1)
        receive_GL = torch.empty_like(send_GL)
        dist.all_to_all_single(receive_GL, send_GL, group=self.group)
        send_counts, receive_counts = torch.stack([send_GL.sum(1), receive_GL.sum(1)]).tolist()
        local_expert_GL = torch.arange(send_GL.shape[1], device=send_GL.device).expand_as(send_GL)
        local_expert_R = local_expert_GL.flatten().repeat_interleave(
            receive_GL.flatten(), output_size=sum(receive_counts)
        )
        return Exchange(send_counts, receive_counts, order_by_expert(local_expert_R.unsqueeze(1), send_GL.shape[1]))
