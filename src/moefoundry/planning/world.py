"""Simulated world: one process is rank 0 of any number of ranks, and collectives do nothing.

PyTorch has this for tests of distributed code. Meshes, groups and shards are those of a real world.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from moefoundry.mesh import EXPERT, EXPERT_NODE, EXPERT_PLACE, EXPERT_SHARD, REPLICATE, SHARD, MeshDegrees

WORLD = "world"
"""The axis of collectives over all ranks."""


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """Make this process rank 0 of ``size`` simulated ranks.

    Raises:
        ValueError: This process is in a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a plan needs a process that is in no process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def groups_by_axis(degrees: MeshDegrees) -> dict[str, list[list[int]]]:
    """List the ranks of every group along each mesh axis and :data:`WORLD`, as ``mesh.build_meshes`` has them."""
    ranks = torch.arange(degrees.world_size)
    ranks = ranks.view(degrees.replicate, degrees.shard // degrees.expert, degrees.expert_nodes, -1)
    dims = {REPLICATE: [0], SHARD: [1, 2, 3], EXPERT_SHARD: [1], EXPERT: [2, 3], EXPERT_NODE: [2], EXPERT_PLACE: [3]}
    groups = {WORLD: [ranks.flatten().tolist()]}
    for axis, own in dims.items():
        others = [dim for dim in range(ranks.dim()) if dim not in own]
        size = math.prod(ranks.shape[dim] for dim in own)
        groups[axis] = ranks.permute(*others, *own).reshape(-1, size).tolist()
    return groups


def most_remote_peers(groups: list[list[int]], gpus_per_node: int) -> int:
    """Count the peers on other nodes, for the rank that has most of them."""
    nodes = [Counter(rank // gpus_per_node for rank in group) for group in groups]
    return len(groups[0]) - min(min(ranks_on.values()) for ranks_on in nodes)
