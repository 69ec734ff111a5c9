"""Dispatch for experts that span nodes: a token crosses the node border once for each node, and fans out inside it.

With K experts a token, the plain all-to-all sends it K times, wherever the experts are. Links inside a node are many
times faster than those between nodes, so here it takes two hops (DeepSeek-V3, arXiv 2412.19437, section 3.2.2):

    hop 1   one row for each (token, node) that has an expert of it, to the rank of that node with the same place in
            its node as the sender (the *relay*); with it go the experts it is for and their weights
    hop 2   inside the node: one row for each (token, expert), from the relay to the expert's rank

and back the same way: the relay adds up the weighted results of its node's experts, so one row for each (token, node)
crosses the border again. Node-limited routing (``router.top_k_groups``) bounds how many those are.

P pairs (token, node) on their way, A nodes of the group, M ranks of it in each, L experts of each rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.moe.dispatch import Arrival, DispatchMetadata, order_of_arrivals
from moefoundry.ops.all_to_all import Splits, all_gather_rows, all_to_all_rows, finish_all_to_all, start_all_to_all
from moefoundry.ops.permute import RowOrder, count_by_expert, order_by_expert, permute, unpermute


@dataclass(frozen=True)
class TwoHopMetadata(DispatchMetadata):
    """Of :class:`TwoHopDispatcher`.

    Attributes:
        order: Of this rank's pairs, by node: [T, A] "slots", of which those are kept that have an expert.
        topk_weights_TK: Ones [T, A]: the relays have weighted already.
        between, inside: How rows went in hop 1 and hop 2.
        relay_order: Of the slots [P, K] of the pairs this rank relays, by expert of the node.
        relay_weights_PK: Their weights, differentiable.
        arrival_order: Put the received rows into the order of this rank's experts.
    """

    between: Splits
    inside: Splits
    relay_order: RowOrder
    relay_weights_PK: Tensor
    arrival_order: RowOrder


class TwoHopDispatcher:
    """Like :class:`~moefoundry.moe.dispatch.AllToAllDispatcher`, over a group that spans nodes.

    One exchange of counts over the whole group and one wait for the host cover both hops.

    Args:
        num_experts: E, a multiple of the group's size.
        group: The ranks of the mesh axis ``expert``, node by node.
        between: Ranks of the group with this rank's place in their node, one of each node.
        inside: Ranks of the group on this rank's node.

    Raises:
        ValueError: The group's size does not divide E, or the three groups do not fit each other.
    """

    def __init__(
        self, num_experts: int, group: dist.ProcessGroup, between: dist.ProcessGroup, inside: dist.ProcessGroup
    ) -> None:
        if num_experts % group.size():
            raise ValueError(f"{num_experts} experts do not divide among {group.size()} ranks")
        if between.size() * inside.size() != group.size():
            raise ValueError(f"{between.size()} nodes of {inside.size()} ranks are not {group.size()} ranks")
        self.num_experts = num_experts
        self.group, self.between, self.inside = group, between, inside
        self.experts_per_node = num_experts // between.size()

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Arrival:
        pair_TA = self._nodes_of(topk_expert_ids_TK, kept_TK)
        counts_E = count_by_expert(topk_expert_ids_TK, self.num_experts, kept_TK)
        between, inside, arriving_ML = self._plan(counts_E, pair_TA.sum(dim=0))
        order = order_by_expert(
            torch.arange(pair_TA.shape[1], device=pair_TA.device).expand_as(pair_TA),
            pair_TA.shape[1],
            pair_TA,
            num_kept=sum(between.send),
        )
        slots_PK = start_all_to_all(self._slots_of_pairs(topk_expert_ids_TK, kept_TK, order), between)
        weights_PK = start_all_to_all(permute(topk_weights_TK.to(tokens_TD.dtype), order), between)
        rows_PD = start_all_to_all(permute(tokens_TD, order), between)

        def arrive() -> tuple[Tensor, DispatchMetadata]:
            relayed_PK = finish_all_to_all(slots_PK).view(torch.int16).long()
            relay_order = order_by_expert(relayed_PK, self.experts_per_node, relayed_PK >= 0, sum(inside.send))
            relay_weights_PK = finish_all_to_all(weights_PK)
            rows_RD = all_to_all_rows(permute(finish_all_to_all(rows_PD), relay_order), inside)
            arrival_order = order_of_arrivals(arriving_ML, sum(inside.receive))
            metadata = TwoHopMetadata(
                arrival_order.tokens_per_expert_E,
                order,
                torch.ones_like(pair_TA, dtype=rows_RD.dtype),
                between=between,
                inside=inside,
                relay_order=relay_order,
                relay_weights_PK=relay_weights_PK,
                arrival_order=arrival_order,
            )
            return permute(rows_RD, arrival_order), metadata

        return arrive

    def combine(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        assert isinstance(metadata, TwoHopMetadata), "made by this dispatcher"
        rows_RD = permute(rows_RD, metadata.arrival_order.inverse())
        rows = all_to_all_rows(rows_RD, metadata.inside.reverse())
        rows_PD = unpermute(rows, metadata.relay_weights_PK, metadata.relay_order)
        rows_PD = all_to_all_rows(rows_PD, metadata.between.reverse())
        return unpermute(rows_PD, metadata.topk_weights_TK, metadata.order)

    def _nodes_of(self, topk_expert_ids_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        """bool [T, A]: whether a token has an expert on a node."""
        node_TK = topk_expert_ids_TK // self.experts_per_node
        hit_TK = torch.ones_like(node_TK, dtype=torch.bool) if kept_TK is None else kept_TK
        hits_TA = hit_TK.new_zeros(len(node_TK), self.between.size(), dtype=torch.int32)
        return hits_TA.scatter_add_(1, node_TK, hit_TK.int()) > 0

    def _slots_of_pairs(self, topk_expert_ids_TK: Tensor, kept_TK: Tensor | None, order: RowOrder) -> Tensor:
        """int16 [P, K], as bytes [P, 2K] that any backend moves: for each pair, the token's experts, counted within the
        pair's node (at most 32,768); -1 where they are not of it."""
        token_P, node_P = order.token_of_row_N, order.slot_of_row_N % self.between.size()
        slots_PK = topk_expert_ids_TK[token_P] - (node_P * self.experts_per_node).unsqueeze(1)
        meant_PK = (slots_PK >= 0) & (slots_PK < self.experts_per_node)
        if kept_TK is not None:
            meant_PK &= kept_TK[token_P]
        return slots_PK.where(meant_PK, -1).to(torch.int16).view(torch.uint8)

    def _plan(self, counts_E: Tensor, pairs_A: Tensor) -> tuple[Splits, Splits, Tensor]:
        """Splits of both hops, and how many rows come from each rank of this node for each of this rank's experts."""
        nodes, ranks = self.between.size(), self.inside.size()
        node, place = self.between.rank(), self.inside.rank()
        gathered = all_gather_rows(torch.cat([counts_E, pairs_A]), self.group).view(nodes, ranks, -1)
        # by sender's node and place, then by expert's node, place and number there
        counts_AMAML = gathered[..., : self.num_experts].view(nodes, ranks, nodes, ranks, -1)
        pairs_AMA = gathered[..., self.num_experts :]
        arriving_ML = counts_AMAML[:, :, node, place].sum(0)
        sizes = [
            pairs_AMA[node, place],
            pairs_AMA[:, place, node],
            counts_AMAML[:, place, node].sum((0, 2)),
            arriving_ML.sum(1),
        ]
        counts = torch.cat(sizes).tolist()  # the one wait for the host
        send_pairs, receive_pairs, send, receive = (
            counts[:nodes],
            counts[nodes : 2 * nodes],
            counts[2 * nodes : 2 * nodes + ranks],
            counts[2 * nodes + ranks :],
        )
        return Splits(send_pairs, receive_pairs, self.between), Splits(send, receive, self.inside), arriving_ML
