"""Bring each token's rows to its experts and the results back.

A dispatcher is the only part of the layer that knows where experts live. All of them share one interface; what
``combine`` needs of ``dispatch`` travels in a frozen :class:`DispatchMetadata`, not in the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.ops.all_to_all import Splits, all_to_all_rows, finish_all_to_all, start_all_to_all
from moefoundry.ops.permute import RowOrder, count_by_expert, order_by_expert, permute, unpermute


@dataclass(frozen=True)
class DispatchMetadata:
    """What ``combine`` needs to undo ``dispatch``; dispatchers add to it.

    Attributes:
        tokens_per_local_expert: int64 [num_local_experts]; how the R received rows split.
        order: The local reorder of this rank's slots.
        topk_weights_TK: The weights of the sum.
    """

    tokens_per_local_expert: Tensor
    order: RowOrder
    topk_weights_TK: Tensor


Arrival = Callable[[], tuple[Tensor, DispatchMetadata]]
"""Rows under way. Called, it waits for them: [R, D] in the order of this rank's experts, and the metadata."""


class TokenDispatcher(Protocol):
    """What the layer asks of a dispatcher."""

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Arrival:
        """Send a copy of each token toward each of its experts; work done before the arrival is asked for overlaps.

        Args:
            tokens_TD: This rank's tokens, [T, D].
            topk_expert_ids_TK: int64 [T, K], distinct within a token.
            topk_weights_TK: [T, K], differentiable; ``combine`` weights the results with them.
            kept_TK: bool [T, K]; slots that are sent. None sends all.
        """
        ...

    def combine(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        """[R, D] -> [T, D], the weighted sum over each token's (kept) experts."""
        ...


class LocalDispatcher:
    """All experts are on this rank: dispatch is a permutation."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Arrival:
        order = order_by_expert(topk_expert_ids_TK, self.num_experts, kept_TK)
        metadata = DispatchMetadata(order.tokens_per_expert_E, order, topk_weights_TK)
        return lambda: (permute(tokens_TD, order), metadata)

    def combine(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        return unpermute(rows_RD, metadata.topk_weights_TK, metadata.order)


@dataclass(frozen=True)
class AllToAllMetadata(DispatchMetadata):
    """Of :class:`AllToAllDispatcher`.

    Attributes:
        splits: How rows went.
        arrival_order: Put the received rows, which come by sender, into the order of this rank's experts.
    """

    splits: Splits
    arrival_order: RowOrder


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

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Arrival:
        send_GL = count_by_expert(topk_expert_ids_TK, self.num_experts, kept_TK).view(self.group.size(), -1)
        receive_GL = self._exchange_counts(send_GL)
        send, receive = torch.stack([send_GL.sum(1), receive_GL.sum(1)]).tolist()
        splits = Splits(send, receive, self.group)
        order = order_by_expert(topk_expert_ids_TK, self.num_experts, kept_TK, num_kept=sum(send))
        rows = start_all_to_all(permute(tokens_TD, order), splits)

        def arrive() -> tuple[Tensor, DispatchMetadata]:
            arrival_order = order_of_arrivals(receive_GL, sum(receive))
            metadata = AllToAllMetadata(
                arrival_order.tokens_per_expert_E, order, topk_weights_TK, splits=splits, arrival_order=arrival_order
            )
            return permute(finish_all_to_all(rows), arrival_order), metadata

        return arrive

    def combine(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        assert isinstance(metadata, AllToAllMetadata), "made by this dispatcher"
        rows_RD = permute(rows_RD, metadata.arrival_order.inverse())
        rows_ND = all_to_all_rows(rows_RD, metadata.splits.reverse())
        return unpermute(rows_ND, metadata.topk_weights_TK, metadata.order)

    def _exchange_counts(self, send_GL: Tensor) -> Tensor:
        """What each of G ranks has for each of this rank's L experts, [G, L]."""
        one_each = Splits([1] * len(send_GL), [1] * len(send_GL), self.group)
        return all_to_all_rows(send_GL, one_each)


def order_of_arrivals(counts_GL: Tensor, num_rows: int) -> RowOrder:
    """The order by local expert of rows that came sorted by sender, and by local expert within each.

    Args:
        counts_GL: int64; rows from each of G senders for each of L local experts.
        num_rows: Their sum, which the host knows.
    """
    num_local = counts_GL.shape[1]
    local_expert_GL = torch.arange(num_local, device=counts_GL.device).expand_as(counts_GL)
    local_expert_R = local_expert_GL.flatten().repeat_interleave(counts_GL.flatten(), output_size=num_rows)
    return order_by_expert(local_expert_R.unsqueeze(1), num_local)
