"""Dispatch for experts that span nodes: a token crosses the node border once for each node, and fans out inside it.

Links inside a node are many times faster than those between nodes, so where the plain all-to-all sends a token to each
rank that has an expert of it, here it takes two hops (DeepSeek-V3, arXiv 2412.19437, section 3.2.2):

    hop 1   one row for each (token, node) that has an expert of it, to the rank of that node with the same place in
            its node as the sender (the *relay*); with it go the experts it is for and their weights
    hop 2   inside the node: one row for each (token, rank), from the relay to the experts' rank

and back the same way: ranks add up the weighted results of their experts and the relay those of its node, so one row
for each (token, node) crosses the border again. Node-limited routing (``router.top_k_groups``) bounds how many those
are.

A nodes of the group, M ranks of it in each.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.moe.dispatch import AllToAllDispatcher, pairs_and_slots
from moefoundry.ops.all_to_all import Splits, all_gather_rows


class TwoHopDispatcher(AllToAllDispatcher):
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
        super().__init__(num_experts, group)
        if between.size() * inside.size() != group.size():
            raise ValueError(f"{between.size()} nodes of {inside.size()} ranks are not {group.size()} ranks")
        self.between, self.inside = between, inside

    def _plan(self, expert_ids_TK: Tensor) -> tuple[list[Splits], int]:
        nodes, ranks = self.between.size(), self.inside.size()
        node, place = self.between.rank(), self.inside.rank()
        pairs_A, _ = pairs_and_slots(expert_ids_TK, self.num_experts, nodes)
        pairs_G, slots_G = pairs_and_slots(expert_ids_TK, self.num_experts, nodes * ranks)
        gathered = all_gather_rows(torch.cat([pairs_A, pairs_G, slots_G]), self.group).view(nodes, ranks, -1)
        # by sender's node and place, then by the experts' node and place there
        pairs_AMA, pairs_AMAM, slots_AMAM = gathered.split([nodes, nodes * ranks, nodes * ranks], dim=2)
        pairs_AMAM, slots_AMAM = (counts.view(nodes, ranks, nodes, ranks) for counts in (pairs_AMAM, slots_AMAM))
        sizes = [
            pairs_AMA[node, place],
            pairs_AMA[:, place, node],
            pairs_AMAM[:, place, node].sum(0),
            pairs_AMAM[:, :, node, place].sum(0),
            slots_AMAM[:, :, node, place].sum().view(1),
        ]
        counts = iter(torch.cat(sizes).tolist())  # the one wait for the host
        cross, crossed, send, receive = (list(islice(counts, size)) for size in (nodes, nodes, ranks, ranks))
        return [Splits(cross, crossed, self.between), Splits(send, receive, self.inside)], next(counts)
