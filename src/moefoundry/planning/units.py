"""The parts of a sharded model: its blocks, and FSDP's units, as it will allocate, gather and reduce them.

FSDP cuts every parameter along dim 0 into ``ceil(dim0 / shards)`` rows a rank, as ``torch.chunk`` does, so the last
ranks may get fewer rows or none (experts that are fewer than their ranks are cut evenly along dim 1 instead). What a
rank stores, gathers and reduces is padded to the first rank's share; only optimizer state, made from the parameters'
own shapes, is not. So no rank has more than rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moefoundry.config import PrecisionConfig
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.layer import MoELayer
from moefoundry.precision import mixed_precision


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers and reduces together, on rank 0.

    Attributes:
        name: Of the module; the root's is empty.
        axis: The mesh axis that shards it.
        shards, copies: Ranks that share one copy, and copies.
        shard_numel: Elements of a rank's share, padded.
        full_numel: Elements of the whole; of experts, those of an ``expert`` rank.
        param_bytes, reduce_bytes: Of an element, gathered and in the reduction.
        gathers: All-gathers in a micro-batch.
    """

    name: str
    axis: str
    shards: int
    copies: int
    shard_numel: int
    full_numel: int
    param_bytes: int
    reduce_bytes: int
    gathers: int

    @property
    def gathered(self) -> int:
        """Bytes of the whole in the compute dtype: parameters, or the gradients that autograd makes."""
        return self.full_numel * self.param_bytes

    @property
    def reduce_input(self) -> int:
        """Bytes of what goes into the reduce-scatter."""
        return self.shards * self.shard_numel * self.reduce_bytes


@dataclass(frozen=True)
class PlannedBlock:
    """A transformer block.

    Attributes:
        name: Of the module, or of the multi-token-prediction module it belongs to.
        sparse: Whether it has an MoE layer.
        positions: Tokens of a sequence that pass it.
    """

    name: str
    sparse: bool
    positions: int


def planned_blocks(model: MoETransformer, seq_len: int) -> list[PlannedBlock]:
    """The blocks, first to last; those of multi-token prediction come last, and see fewer positions the further ahead
    they look."""
    depth, last = len(model.mtp), len(model.layers)
    names = [f"layers.{i}" for i in range(last)] + [f"mtp.{i}" for i in range(depth)]
    lost = [0] * last + list(range(1, depth + 1))
    return [
        PlannedBlock(name, isinstance(block.ffn, MoELayer), seq_len - less)
        for name, block, less in zip(names, model.blocks, lost, strict=True)
    ]


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Of activations and gathered parameters."""
    return mixed_precision(precision).param_dtype or torch.float32


def fsdp_units(model: nn.Module) -> list[Unit]:
    """The units of a model that ``parallelize`` has sharded, parents before children; none if it is not sharded."""
    return [
        _unit(name, group)
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]


def _unit(name: str, group: Any) -> Unit:
    mesh, policy, parameters = group.mesh_info, group.mp_policy, group.fsdp_params
    param_dtype = policy.param_dtype or torch.float32
    # The root is left gathered after forward, for it is needed again at once (FSDP decides so in its first forward).
    reshards = name != "" and group.post_forward_mesh_info is not None
    return Unit(
        name=name,
        axis=mesh.mesh.mesh_dim_names[mesh.shard_mesh_dim],
        shards=mesh.shard_mesh_size,
        copies=mesh.mesh.size() // mesh.shard_mesh_size,
        shard_numel=sum(parameter.padded_sharded_param_size.numel() for parameter in parameters),
        full_numel=sum(parameter._orig_size.numel() for parameter in parameters),
        param_bytes=param_dtype.itemsize,
        reduce_bytes=(policy.reduce_dtype or param_dtype).itemsize,
        gathers=0 if mesh.shard_mesh_size == 1 else 1 + reshards,
    )
