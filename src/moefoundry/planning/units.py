"""Parts of a sharded model: its blocks, and the units that FSDP allocates, gathers and reduces.

FSDP divides every parameter along dim 0 into ``ceil(dim0 / shards)`` rows a rank, as ``torch.chunk`` does, so the last
ranks may have fewer rows or none (experts that are fewer than their ranks are divided along dim 1). Stored, gathered
and reduced tensors are padded to the first rank's share; optimizer state is not. So no rank has more than rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moefoundry.config import PrecisionConfig
from moefoundry.precision import mixed_precision


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers and reduces together, on rank 0.

    Attributes:
        name: Name of the module; empty for the root.
        axis: The mesh axis that shards it.
        shards: Ranks that share one copy.
        copies: Number of copies.
        shard_numel: Elements of a rank's share, padded.
        full_numel: Elements of the whole; for experts, those of one ``expert`` rank.
        trained_shard_numel, trained_full_numel: Of those, the elements of parameters that train.
        param_bytes: Bytes of a gathered element.
        reduce_bytes: Bytes of an element in the reduction.
        gathers: All-gathers in a micro-batch.
    """

    name: str
    axis: str
    shards: int
    copies: int
    shard_numel: int
    full_numel: int
    trained_shard_numel: int
    trained_full_numel: int
    param_bytes: int
    reduce_bytes: int
    gathers: int

    @property
    def gathered(self) -> int:
        """Bytes of the parameters in the compute dtype."""
        return self.full_numel * self.param_bytes

    @property
    def gradients(self) -> int:
        """Bytes of autograd's gradients, in the compute dtype."""
        return self.trained_full_numel * self.param_bytes

    @property
    def reduce_input(self) -> int:
        """Bytes of the input of the reduce-scatter."""
        return self.shards * self.trained_shard_numel * self.reduce_bytes


@dataclass(frozen=True)
class PlannedBlock:
    """A transformer block.

    Attributes:
        name: Name of the module, or of the multi-token-prediction module around it.
        sparse: The block has an MoE layer.
        positions: Positions of a sequence that it computes.
        linear: The block has linear attention.
    """

    name: str
    sparse: bool
    positions: int
    linear: bool = False


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Give the dtype of activations and gathered parameters."""
    return mixed_precision(precision).param_dtype or torch.float32


def fsdp_units(model: nn.Module) -> list[Unit]:
    """List the units of a model after ``parallelize``, parents before children; none if it is not sharded."""
    return [
        _unit(name, group)
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]


def _unit(name: str, group: Any) -> Unit:
    mesh, policy, parameters = group.mesh_info, group.mp_policy, group.fsdp_params
    param_dtype = policy.param_dtype or torch.float32
    # The root stays gathered after the forward pass, since the backward pass begins with it.
    reshards = name != "" and group.post_forward_mesh_info is not None
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
        gathers=0 if mesh.shard_mesh_size == 1 else 1 + reshards,
    )
