"""Ranks of a mesh, axis by axis, and the nodes that they are on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from moefoundry.mesh import EXPERT, EXPERT_NODE, EXPERT_PLACE, EXPERT_SHARD, REPLICATE, SHARD, MeshDegrees

WORLD = "world"
"""The axis of collectives over all ranks."""


@dataclass(frozen=True)
class Groups:
    """Groups of ranks along a mesh axis. The ranks of a group are ``stride`` apart, and other groups lie between them.

    Attributes:
        ranks: Ranks of a group.
        stride: Difference of the numbers of neighbours in a group.
        world_size: Ranks of all groups.
    """

    ranks: int
    stride: int
    world_size: int


def groups_by_axis(degrees: MeshDegrees) -> dict[str, Groups]:
    """Describe the groups along each mesh axis and :data:`WORLD`, as ``mesh.build_meshes`` has them."""
    nodes, world_size = degrees.expert_nodes, degrees.world_size
    places = degrees.expert // nodes
    axes = {
        WORLD: (world_size, 1),
        REPLICATE: (degrees.replicate, degrees.shard),
        SHARD: (degrees.shard, 1),
        EXPERT_SHARD: (degrees.shard // degrees.expert, degrees.expert),
        EXPERT: (degrees.expert, 1),
        EXPERT_NODE: (nodes, places),
        EXPERT_PLACE: (places, 1),
    }
    return {axis: Groups(ranks, stride, world_size) for axis, (ranks, stride) in axes.items()}


@cache
def peers_on_other_nodes(degrees: MeshDegrees, gpus_per_node: int) -> dict[str, int]:
    """Count, for each axis, the peers on other nodes of the rank that has most of them."""
    return {axis: most_remote_peers(groups, gpus_per_node) for axis, groups in groups_by_axis(degrees).items()}


def most_remote_peers(groups: Groups, gpus_per_node: int) -> int:
    """Count the peers on other nodes, for the rank that has most of them.

    Groups that lie between each other fill a block of consecutive ranks. Where a block and a node share few ranks, few
    of a group are on that node; at least the rank itself is.
    """
    block = groups.ranks * groups.stride
    shared = _shortest_shared(block, min(gpus_per_node, groups.world_size), groups.world_size)
    return groups.ranks - max(1, shared // groups.stride)


def _shortest_shared(block: int, node: int, world_size: int) -> int:
    """Count the ranks that a block and a node have in common, where they are fewest, if they have any.

    Args:
        block: Ranks of a block; divides the world size.
        node: Ranks of a node, at most all; the last node may have fewer.
        world_size: All ranks.
    """
    smaller, larger = sorted((block, node))
    shortest = min(smaller, world_size % node or smaller)
    for border in range(larger, min(world_size, math.lcm(block, node)), larger):  # borders repeat after that
        if before := border % smaller:
            shortest = min(shortest, before, smaller - before, world_size - border)
    return shortest
