"""From three numbers to a device mesh. The only place that names mesh axes.

``replicate x shard`` is the world size: parameters are sharded over ``shard`` and copied over ``replicate`` (HSDP).
Ranks of one shard group are neighbours, so that the collectives that move most stay inside as few nodes as possible.
Degrees are checked and inferred without torch, before any process group exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moefoundry.config import ConfigError, MeshConfig, Problem

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

REPLICATE = "replicate"
SHARD = "shard"
EXPERT = "expert"


@dataclass(frozen=True)
class MeshDegrees:
    """Sizes of the mesh axes, all known."""

    replicate: int
    shard: int
    expert: int

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard


def resolve_degrees(cfg: MeshConfig, world_size: int) -> MeshDegrees:
    """Replace the one -1 by what the world size leaves.

    Raises:
        ConfigError: The degrees do not make up the world size, or ``expert`` does not divide ``shard``.
    """
    replicate, shard = cfg.replicate, cfg.shard
    if replicate == -1 and shard == -1:
        raise _error("replicate", "only one of mesh.replicate and mesh.shard may be -1")
    if replicate == -1:
        replicate = world_size // shard
    elif shard == -1:
        shard = world_size // replicate
    if replicate * shard != world_size:
        raise _error(
            "replicate", f"replicate {cfg.replicate} x shard {cfg.shard} does not make up a world size of {world_size}"
        )
    if shard % cfg.expert:
        raise _error("expert", f"expert {cfg.expert} does not divide shard {shard}")
    return MeshDegrees(replicate, shard, cfg.expert)


def build_mesh(degrees: MeshDegrees, device_type: str) -> DeviceMesh:
    """The mesh of dense parameters, axes (replicate, shard); needs an initialized process group.

    Args:
        degrees: From :func:`resolve_degrees`.
        device_type: ``cpu`` or ``cuda``.
    """
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (degrees.replicate, degrees.shard), mesh_dim_names=(REPLICATE, SHARD))


def dense_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh to shard dense parameters on: 2-D for HSDP, 1-D over ``shard`` where nothing is replicated."""
    return mesh if mesh[REPLICATE].size() > 1 else mesh[SHARD]


def _error(key: str, message: str) -> ConfigError:
    return ConfigError([Problem(f"mesh.{key}", message)])
