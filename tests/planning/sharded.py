"""The sharded model as training builds it, in a world of ranks that are not there: plans are compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moefoundry.adapters import apply_lora
from moefoundry.config import Recipe
from moefoundry.mesh import build_meshes, resolve_degrees
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.parallel import parallelize
from moefoundry.planning.units import Unit


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """Make this process rank 0 of ``size`` simulated ranks, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def built(recipe: Recipe) -> MoETransformer:
    """The model on meta, with adapters."""
    model = meta_model(recipe.model)
    if recipe.lora is not None:
        apply_lora(model, recipe.lora)
    return model


def units_of(recipe: Recipe, world_size: int, gpus_per_node: int = 8) -> list[Unit]:
    """The units that FSDP makes; none if the model is not sharded."""
    degrees, model = resolve_degrees(recipe.mesh, world_size, gpus_per_node), built(recipe)
    with fake_world(world_size):
        meshes = build_meshes(degrees, "cpu") if degrees.world_size > 1 else None
        parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
        return [
            _unit(name, group)
            for name, module in model.named_modules()
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None
        ]


def _unit(name: str, group: Any) -> Unit:
    mesh, policy, parameters = group.mesh_info, group.mp_policy, group.fsdp_params
    param_dtype = policy.param_dtype or torch.float32
    again = name != "" and group.post_forward_mesh_info is not None and group.unshard_in_backward
    trained = [parameter for parameter in parameters if parameter.sharded_param.requires_grad]
    return Unit(
        name=name,
        axis=mesh.mesh.mesh_dim_names[mesh.shard_mesh_dim],
        shards=mesh.shard_mesh_size,
        copies=mesh.mesh.size() // mesh.shard_mesh_size,
        shard_numel=sum(parameter.padded_sharded_param_size.numel() for parameter in parameters),
        full_numel=sum(parameter._orig_size.numel() for parameter in parameters),
        trained_shard_numel=sum(parameter.padded_sharded_param_size.numel() for parameter in trained),
        trained_full_numel=sum(parameter._orig_size.numel() for parameter in trained),
        param_bytes=param_dtype.itemsize,
        reduce_bytes=(policy.reduce_dtype or param_dtype).itemsize,
        gathers=0 if mesh.shard_mesh_size == 1 else 1 + again,
    )


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
