"""Ranks of a mesh, group by group, and the nodes that they are on."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import product

from moefoundry.mesh import EXPERT, EXPERT_NODE, EXPERT_PLACE, EXPERT_SHARD, REPLICATE, SHARD, MeshDegrees

WORLD = "world"
"""The axis of collectives over all ranks."""


@cache
def groups_by_axis(degrees: MeshDegrees) -> dict[str, list[list[int]]]:
    """List the ranks of every group along each mesh axis and :data:`WORLD`, as ``mesh.build_meshes`` has them."""
    nodes = degrees.expert_nodes
    sizes = (degrees.replicate, degrees.shard // degrees.expert, nodes, degrees.expert // nodes)
    dims = {
        REPLICATE: (0,),
        SHARD: (1, 2, 3),
        EXPERT_SHARD: (1,),
        EXPERT: (2, 3),
        EXPERT_NODE: (2,),
        EXPERT_PLACE: (3,),
    }
    groups = {WORLD: [list(range(degrees.world_size))]}
    places = list(product(*map(range, sizes)))  # a rank is its place in this order
    for axis, own in dims.items():
        members: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            others = tuple(place[dim] for dim in range(len(sizes)) if dim not in own)
            members.setdefault(others, []).append(rank)
        groups[axis] = list(members.values())
    return groups


@cache
def peers_on_other_nodes(degrees: MeshDegrees, gpus_per_node: int) -> dict[str, int]:
    """Count, for each axis, the peers on other nodes of the rank that has most of them."""
    return {axis: most_remote_peers(groups, gpus_per_node) for axis, groups in groups_by_axis(degrees).items()}


def most_remote_peers(groups: list[list[int]], gpus_per_node: int) -> int:
    """Count the peers on other nodes, for the rank that has most of them."""
    nodes = [Counter(rank // gpus_per_node for rank in group) for group in groups]
    return len(groups[0]) - min(min(ranks_on.values()) for ranks_on in nodes)
