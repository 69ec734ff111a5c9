"""Join the world of ranks that a launcher has started, or rejoin it after a restart, and build the meshes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed
from composer.devices import Device, DeviceCPU, DeviceGPU
from composer.utils import dist

from moefoundry.config import Recipe, UserError
from moefoundry.mesh import MeshDegrees, Meshes, build_meshes, limit_waiting, resolve_degrees


def device_of_rank() -> Device:
    """Give the device that this rank computes on: its GPU, where there are any.

    Products in fp32 are exact: Composer's default would round their operands to TF32. A launcher may show each rank its
    own GPU alone.

    Raises:
        UserError: The ranks of this node are more than its GPUs.
    """
    if not torch.cuda.is_available():
        return DeviceCPU()
    visible, ranks = torch.cuda.device_count(), dist.get_local_world_size()
    if 1 < visible < ranks:
        raise UserError(f"{ranks} ranks were started on a node with {visible} GPUs: start one for each, or fewer")
    return DeviceGPU(0 if visible == 1 else None, allow_tf32=False)


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
    connect(meshes, torch_device(device))
    return meshes


def connect(meshes: Meshes, device: torch.device) -> None:
    """Let the ranks of each group meet once, in an order that all have. A collective.

    NCCL makes a group's communicator, with memory of its own, at the first collective. For gradients between copies
    that would be at the end of a backward pass, when memory may be short: one rank would fail, and the others wait.
    """
    for group in meshes.groups:
        torch.distributed.all_reduce(torch.zeros(1, device=device), group=group)
    for mesh in (meshes.expert, *(meshes.expert_hops or ())):
        rows = torch.zeros(mesh.size(), device=device)
        torch.distributed.all_to_all_single(torch.empty_like(rows), rows, group=mesh.get_group())


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
