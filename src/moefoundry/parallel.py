"""Everything that turns the single-device model into a distributed one, in the one order that works.

    precision -> expert parallelism -> activation checkpointing -> FSDP

Call it on a model built on meta, then :func:`materialize`: each rank allocates and fills only its own shard.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moefoundry.config import ActivationCheckpointing, PrecisionConfig
from moefoundry.mesh import Meshes
from moefoundry.model.init import init_weights
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.dispatch import AllToAllDispatcher, TokenDispatcher
from moefoundry.moe.layer import MoELayer
from moefoundry.moe.two_hop import TwoHopDispatcher
from moefoundry.ops.all_to_all import EXCHANGE_OPS
from moefoundry.precision import apply_precision, full_precision_modules, mixed_precision

KEPT_OPS = EXCHANGE_OPS | frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""What ``selective`` keeps: products, attention and what ranks exchanged; norms, activations and reorders are
recomputed."""

FSDP_MARKERS = frozenset(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)
"""FSDP's profiler marks. Experts are an FSDP unit inside a checkpointed block, whose number of marks is another when it
is recomputed; ``selective`` matches operations by their count and must leave these out."""


def parallelize(
    model: MoETransformer,
    meshes: Meshes | None,
    precision: PrecisionConfig,
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
) -> None:
    """Transform ``model`` in place.

    Args:
        model: As built, on any device.
        meshes: From ``mesh.build_meshes``; None leaves the model on one device, unsharded.
        precision: The recipe's ``precision``.
        activation_checkpointing: What the backward pass recomputes.

    Raises:
        ValueError: BF16 without a mesh; FSDP does the casting (a mesh of one rank will do).
    """
    apply_precision(model, precision)
    if meshes is not None and meshes.expert.size() > 1:
        _divide_experts(model, meshes)
    if meshes is not None and model.step_counts is not None:
        model.step_counts.group = dist.group.WORLD  # every rank is a data-parallel rank
    if activation_checkpointing != ActivationCheckpointing.none:
        _checkpoint_activations(model, activation_checkpointing)
    if meshes is not None:
        _shard(model, meshes, precision)
    elif mixed_precision(precision).param_dtype is not None:
        raise ValueError("compute: bf16 needs a mesh, if only of one rank: FSDP casts the parameters")


def materialize(model: MoETransformer, device: torch.device | str, seed: int) -> None:
    """Allocate this rank's shard on ``device`` and give it its initial weights."""
    model.to_empty(device=device)
    init_weights(model, model.cfg.init.std, seed)


def _divide_experts(model: MoETransformer, meshes: Meshes) -> None:
    """Give each rank of the expert axis its share of every layer's experts, and the layer a dispatcher that finds
    them."""
    for layer in moe_layers(model):
        for name, weight in layer.experts.named_parameters():
            share = distribute_tensor(weight.detach(), meshes.expert, [Shard(0)])
            layer.experts.register_parameter(name, nn.Parameter(share))
        layer.dispatcher = _dispatcher(model.cfg.moe.num_experts, meshes)


def _dispatcher(num_experts: int, meshes: Meshes) -> TokenDispatcher:
    group = meshes.expert.get_group()
    if meshes.expert_hops is None:
        return AllToAllDispatcher(num_experts, group)
    return TwoHopDispatcher(num_experts, group, *(mesh.get_group() for mesh in meshes.expert_hops))


def _checkpoint_activations(model: MoETransformer, mode: ActivationCheckpointing) -> None:
    """Checkpoint each block's ``forward`` itself; a wrapper module would change the parameters' names."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == ActivationCheckpointing.selective:
        SAC_IGNORED_OPS.update(FSDP_MARKERS)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _keep_products(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(model: MoETransformer, meshes: Meshes, precision: PrecisionConfig) -> None:
    policy = mixed_precision(precision)
    for module in full_precision_modules(model, precision):
        fully_shard(module, mesh=meshes.dense, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    if meshes.expert.size() > 1:
        for layer in moe_layers(model):
            fully_shard(layer.experts, mesh=meshes.expert_fsdp, mp_policy=policy)
    for block in model.layers:
        fully_shard(block, mesh=meshes.dense, mp_policy=policy)
    fully_shard(model, mesh=meshes.dense, mp_policy=policy)


def moe_layers(model: MoETransformer) -> list[MoELayer]:
    """The MoE layers, first to last."""
    return [block.ffn for block in model.layers if isinstance(block.ffn, MoELayer)]


def moe_layer_indices(model: MoETransformer) -> list[int]:
    """Index among the model's blocks of each MoE layer."""
    return [index for index, block in enumerate(model.layers) if isinstance(block.ffn, MoELayer)]
