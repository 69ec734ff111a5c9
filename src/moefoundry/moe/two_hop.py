"""Dispatch for experts that span nodes: a token is sent once to each node, and from there to the node's ranks.

Links inside a node are many times faster than links between nodes. The plain all-to-all sends a token to each rank that
has an expert of it; here that takes two exchanges (DeepSeek-V3, arXiv 2412.19437, section 3.2.2):

    hop 1   between nodes: one row for each (token, node) with an expert of it, to the rank that has the sender's place
            in its node, with the experts and weights of the token
    hop 2   inside the node: one row for each (token, rank), from that rank to the experts' rank

Results return the same way: ranks add up the weighted results of their experts, the rank in between adds up those of
its node, and one row for each (token, node) goes back. Node-limited routing (``router.top_k_groups``) bounds their
number.

A is the number of nodes of the group, M the number of its ranks in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.moe.dispatch import AllToAllDispatcher, pairs_and_slots
from moefoundry.ops.all_to_all import Splits, all_gather_rows
from moefoundry.ops.recompute import on_the_host


class TwoHopDispatcher(AllToAllDispatcher):
    """An :class:`~moefoundry.moe.dispatch.AllToAllDispatcher` for a group that spans nodes.

    One exchange of counts over the whole group, and one wait for the host, serve both hops.

    Args:
        num_experts: E, a multiple of the group's size.
        group: The ranks of the mesh axis ``expert``, node by node.
        between: Ranks of the group that have this rank's place in their node, one on each node.
        inside: Ranks of the group on this rank's node.

    Raises:
        ValueError: The group's size does not divide E, or the three groups do not fit each other.
    """

    def __init__(
        self, num_experts: int, group: dist.ProcessGroup, between: dist.ProcessGroup, inside: dist.ProcessGroup
    ) -> None:
        super().__init__(num_experts, group)
        if between.size() * inside.size() != group.size():
            raise ValueError(f"{between.size()} nodes of {inside.size()} ranks are not {group.size()} ranks")
        self.between, self.inside = between, inside

    def _plan(self, chunks: Sequence[Tensor]) -> list[tuple[list[Splits], int]]:
        nodes, ranks = self.between.size(), self.inside.size()
        counted = torch.stack([self._count(ids_TK) for ids_TK in chunks])
        gathered = all_gather_rows(counted, self.group).view(nodes, ranks, len(chunks), -1)
        sizes = torch.cat([size for counts_AMX in gathered.unbind(2) for size in self._sizes(counts_AMX)])
        counts = iter(on_the_host(sizes))  # the one wait for the host
        plans = []
        for _ in chunks:
            cross, crossed, send, receive = (list(islice(counts, size)) for size in (nodes, nodes, ranks, ranks))
            plans.append(([Splits(cross, crossed, self.between), Splits(send, receive, self.inside)], next(counts)))
        return plans

    def _count(self, expert_ids_TK: Tensor) -> Tensor:
        """Count this rank's tokens for each node and rank, and their slots for each rank, int64 [A + 2 A M]."""
        nodes = self.between.size()
        pairs_A, _ = pairs_and_slots(expert_ids_TK, self.num_experts, nodes)
        return torch.cat([pairs_A, *pairs_and_slots(expert_ids_TK, self.num_experts, nodes * self.inside.size())])

    def _sizes(self, counts_AMX: Tensor) -> list[Tensor]:
        """Sizes of both hops of this rank, sent and received, and its number of rows.

        Args:
            counts_AMX: What :meth:`_count` gives on each rank, by node and place.
        """
        nodes, ranks = self.between.size(), self.inside.size()
        node, place = self.between.rank(), self.inside.rank()
        # by sender's node and place, then by the experts' node and place there
        pairs_AMA, pairs_AMAM, slots_AMAM = counts_AMX.split([nodes, nodes * ranks, nodes * ranks], dim=2)
        pairs_AMAM, slots_AMAM = (counts.view(nodes, ranks, nodes, ranks) for counts in (pairs_AMAM, slots_AMAM))
        return [
            pairs_AMA[node, place],
            pairs_AMA[:, place, node],
            pairs_AMAM[:, place, node].sum(0),
            pairs_AMAM[:, :, node, place].sum(0),
            slots_AMAM[:, :, node, place].sum().view(1),
        ]
