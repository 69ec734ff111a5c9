"""From three numbers to the device meshes. The only place that names mesh axes.

``replicate x shard`` is the world size, and ``expert`` divides ``shard``. One 3-D mesh holds all ranks,

    (replicate, shard / expert, expert)

and every parameter lives on a view of it:

    dense     (replicate, shard)            sharded over shard, copied over replicate: HSDP
    experts   expert                        each rank of it owns num_experts / expert experts
              (replicate, shard / expert)   which are sharded in turn, and copied

``expert`` varies fastest, then the rest of ``shard``: the ranks that exchange tokens are neighbours, then those that
gather parameters, so that what moves most stays inside as few nodes as possible. Where ``expert`` spans whole nodes it
is split in two, ``expert_node x expert_place``, for a dispatch in two hops. Every rank has tokens of its own. Degrees
are checked and inferred without torch, before any process group exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from moefoundry.config import ConfigError, MeshConfig
from moefoundry.config.checks import degree_problems, expert_problems, shard_degree

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T", bound="Tensor")
REPLICATE = "replicate"
SHARD = "shard"
EXPERT = "expert"
EXPERT_SHARD = "expert_shard"  # what is left of shard beside expert
EXPERT_NODE = "expert_node"  # the nodes that an expert group spans
EXPERT_PLACE = "expert_place"  # its ranks on one of them


@dataclass(frozen=True)
class MeshDegrees:
    """Sizes of the mesh axes, all known.

    Attributes:
        expert_nodes: Nodes that an expert group spans; 1 also where it does not fill whole nodes.
    """

    replicate: int
    shard: int
    expert: int
    expert_nodes: int = 1

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
    return MeshDegrees(world_size // shard, shard, cfg.expert, 1 if cfg.expert % per_node else cfg.expert // per_node)


@dataclass(frozen=True)
class Meshes:
    """The views of one device mesh.

    Attributes:
        dense: To shard dense parameters on: (replicate, shard), or (shard) alone where nothing is replicated.
        expert: Ranks among which experts are divided, 1-D.
        expert_fsdp: To shard the experts of a rank on: (replicate, shard / expert), or the latter alone.
        expert_hops: Where ``expert`` spans nodes, its two parts, 1-D each: across nodes, and inside one.
    """

    dense: DeviceMesh
    expert: DeviceMesh
    expert_fsdp: DeviceMesh
    expert_hops: tuple[DeviceMesh, DeviceMesh] | None = None


def build_meshes(degrees: MeshDegrees, device_type: str) -> Meshes:
    """The meshes of a world; needs an initialized process group.

    Args:
        degrees: From :func:`resolve_degrees`.
        device_type: ``cpu`` or ``cuda``.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device_type, (degrees.replicate, degrees.shard), mesh_dim_names=(REPLICATE, SHARD))
    whole = mesh._unflatten(SHARD, (degrees.shard // degrees.expert, degrees.expert), (EXPERT_SHARD, EXPERT))
    copied = (REPLICATE,) if degrees.replicate > 1 else ()
    hops = None
    if degrees.expert_nodes > 1:
        sizes = (degrees.expert_nodes, degrees.expert // degrees.expert_nodes)
        parts = whole._unflatten(EXPERT, sizes, (EXPERT_NODE, EXPERT_PLACE))
        hops = (parts[EXPERT_NODE], parts[EXPERT_PLACE])
    return Meshes(mesh[(*copied, SHARD)], whole[EXPERT], whole[(*copied, EXPERT_SHARD)], hops)


def limit_waiting(meshes: Meshes, seconds: float) -> None:
    """Give every group of the world this time-out; those of a mesh are made with the backend's, of half an hour."""
    from datetime import timedelta

    import torch.distributed as dist

    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # public since torch 2.14
    views = (meshes.dense, meshes.expert, meshes.expert_fsdp, *(meshes.expert_hops or ()))
    for group in {dist.group.WORLD, *(group for view in views for group in view.get_all_groups())}:
        set_timeout(timedelta(seconds=seconds), group)


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Tensors grouped by the mesh they are sharded on, plain ones together; order is kept.

    Operations over lists of DTensors want one mesh; experts and the rest of the model have two.
    """
    groups: dict[object, list[T]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())
