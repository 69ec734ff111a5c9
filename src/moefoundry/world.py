"""Join the world of ranks that a launcher has started, or rejoin it after a restart, and build the meshes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed
from composer.devices import Device
from composer.utils import dist

from moefoundry.config import Recipe
from moefoundry.mesh import MeshDegrees, Meshes, build_meshes, limit_waiting, resolve_degrees


def setup_meshes(recipe: Recipe, device: Device) -> Meshes | None:
    """Join the process group and build the meshes; None where one plain process does."""
    degrees = degrees_of(recipe)
    if degrees.world_size == 1:
        return None
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{recipe.run_dir}/nccl_trace_rank_")
    return join_meshes(degrees, device, recipe.dist_timeout)


def join_meshes(degrees: MeshDegrees, device: Device, timeout_seconds: float) -> Meshes:
    """Join the process group and build the meshes."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        rejoin_world(device, timeout_seconds)
    dist.initialize_dist(device, timeout_seconds)
    meshes = build_meshes(degrees, torch_device(device).type)
    limit_waiting(meshes, timeout_seconds)
    return meshes


def degrees_of(recipe: Recipe) -> MeshDegrees:
    """Resolve the degrees of the recipe's mesh in the launched world."""
    return resolve_degrees(recipe.mesh, dist.get_world_size(), dist.get_local_world_size())


def rejoin_world(device: Device, timeout_seconds: float) -> None:
    """Join the process group of a run that torchrun has restarted.

    Its store outlives the ranks: under the keys of an earlier attempt are addresses where nobody answers.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store = torch.distributed.PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(
        device.dist_backend, store=store, rank=rank, world_size=world_size, timeout=timeout
    )


def torch_device(device: Device) -> torch.device:
    """Give torch's name of a Composer device."""
    return device.tensor_to_device(torch.empty(0)).device
