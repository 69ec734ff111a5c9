"""Device meshes from the degrees of a recipe. The only place that names mesh axes.

``replicate x shard`` is the world size, and ``expert`` divides ``shard``. One 3-D mesh has all ranks,

    (replicate, shard / expert, expert)

and every parameter is on a view of it:

    dense     (replicate, shard)            sharded over shard, copied over replicate: HSDP
    experts   expert                        each rank of it owns num_experts / expert experts
              (replicate, shard / expert)   which are sharded in turn, and copied

``expert`` varies fastest, then the rest of ``shard``: ranks that exchange tokens have neighbouring numbers, then ranks
that gather parameters, so that the largest traffic stays inside as few nodes as possible. If ``expert`` spans whole
nodes it is split in two, ``expert_node x expert_place``, for a dispatch in two hops. Every rank has its own tokens.
Degrees are checked and inferred without torch, before any process group exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from moefoundry.config import ConfigError, Gather, MeshConfig, Reduce
from moefoundry.config.mesh_rules import degree_problems, expert_problems, shard_degree

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T", bound="Tensor")
REPLICATE = "replicate"
SHARD = "shard"
EXPERT = "expert"
EXPERT_SHARD = "expert_shard"  # shard / expert
EXPERT_NODE = "expert_node"  # the nodes that an expert group spans
EXPERT_PLACE = "expert_place"  # its ranks on one of them


@dataclass(frozen=True)
class MeshDegrees:
    """Sizes of the mesh axes, all known, and how FSDP works on them.

    Attributes:
        expert_nodes: Nodes that an expert group spans; 1 also if it does not fill whole nodes.
        gather: When parameters are gathered.
        reduce: When gradients are reduced.
    """

    replicate: int
    shard: int
    expert: int
    expert_nodes: int = 1
    gather: Gather = Gather.each_pass
    reduce: Reduce = Reduce.each_micro_batch

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard


def resolve_degrees(cfg: MeshConfig, world_size: int, ranks_per_node: int | None = None) -> MeshDegrees:
    """Infer the degree that is -1 from the world size.

    Args:
        cfg: The recipe's ``mesh``.
        world_size: Number of ranks.
        ranks_per_node: The launcher's number, for a recipe without ``ranks_per_node``; None is one node.

    Raises:
        ConfigError: The degrees do not make up the world size, or ``expert`` does not divide ``shard``.
    """
    if problems := [*degree_problems(cfg, world_size), *expert_problems(cfg, world_size, {})]:
        raise ConfigError(problems)
    shard = shard_degree(cfg, world_size)
    assert shard is not None, "the degrees fit the world size"
    per_node = cfg.ranks_per_node or ranks_per_node or world_size
    nodes = 1 if cfg.expert % per_node else cfg.expert // per_node
    return MeshDegrees(world_size // shard, shard, cfg.expert, nodes, cfg.gather, cfg.reduce)


@dataclass(frozen=True)
class Meshes:
    """Views of one device mesh.

    Attributes:
        dense: Mesh of dense parameters: (replicate, shard), or (shard) if nothing is replicated.
        expert: Ranks among which experts are divided, 1-D.
        expert_fsdp: Mesh on which a rank's experts are sharded: (replicate, shard / expert), or the latter alone.
        expert_hops: Two parts of ``expert``, 1-D each: between nodes, and inside a node; None if it spans one node.
        gather: When parameters are gathered.
        reduce: When gradients are reduced.
    """

    dense: DeviceMesh
    expert: DeviceMesh
    expert_fsdp: DeviceMesh
    expert_hops: tuple[DeviceMesh, DeviceMesh] | None = None
    gather: Gather = Gather.each_pass
    reduce: Reduce = Reduce.each_micro_batch

    @property
    def groups(self) -> list[ProcessGroup]:
        """This rank's group along each axis of each view, in an order that all ranks have."""
        views = (self.dense, self.expert, self.expert_fsdp, *(self.expert_hops or ()))
        return list(dict.fromkeys(group for view in views for group in view.get_all_groups()))


def build_meshes(degrees: MeshDegrees, device_type: str) -> Meshes:
    """Build the meshes; needs an initialized process group.

    Args:
        degrees: From :func:`resolve_degrees`.
        device_type: ``cpu`` or ``cuda``.
    """
    from torch.distributed import get_backend
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_type, (degrees.replicate, degrees.shard), mesh_dim_names=(REPLICATE, SHARD))
    # By number: torch 2.11 takes no name here. With a backend, a group of all ranks is no second name of the world's:
    # NCCL would let exchanges wait for FSDP's collectives.
    sizes, names = (degrees.shard // degrees.expert, degrees.expert), (EXPERT_SHARD, EXPERT)
    whole = mesh._unflatten(1, sizes, names, {EXPERT: get_backend()})
    copied = (REPLICATE,) if degrees.replicate > 1 else ()
    hops = None
    if degrees.expert_nodes > 1:
        nodes_and_places = (degrees.expert_nodes, degrees.expert // degrees.expert_nodes)
        parts = whole._unflatten(2, nodes_and_places, (EXPERT_NODE, EXPERT_PLACE))
        hops = (parts[EXPERT_NODE], parts[EXPERT_PLACE])
    views = mesh[(*copied, SHARD)], whole[EXPERT], whole[(*copied, EXPERT_SHARD)]
    return Meshes(*views, hops, degrees.gather, degrees.reduce)


def limit_waiting(meshes: Meshes, seconds: float) -> None:
    """Set the time-out of every group; groups of a mesh have the backend's default of half an hour."""
    from datetime import timedelta

    import torch.distributed as dist

    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # public since torch 2.14
    for group in {dist.group.WORLD, *meshes.groups}:
        set_timeout(timedelta(seconds=seconds), group)


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Group tensors by the mesh that they are sharded on, plain tensors together; order is kept.

    Operations on lists of DTensors need one mesh; experts and the rest of the model have two.
    """
    groups: dict[object, list[T]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())
