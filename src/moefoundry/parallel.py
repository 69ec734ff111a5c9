"""Everything that turns the single-device model into a distributed one, in the one order that works.

    precision -> activation checkpointing -> FSDP

Call it on a model built on meta, then :func:`materialize`: each rank allocates and fills only its own shard.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moefoundry.config import ActivationCheckpointing, PrecisionConfig
from moefoundry.mesh import dense_mesh
from moefoundry.model.init import init_weights
from moefoundry.model.transformer import MoETransformer
from moefoundry.precision import apply_precision, full_precision_modules, mixed_precision

GEMM_OPS = frozenset(
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
"""What ``selective`` keeps: products and attention; norms, activations and reorders are recomputed."""


def parallelize(
    model: MoETransformer,
    mesh: DeviceMesh | None,
    precision: PrecisionConfig,
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
) -> None:
    """Transform ``model`` in place.

    Args:
        model: As built, on any device.
        mesh: From ``mesh.build_mesh``; None leaves the model on one device, unsharded.
        precision: The recipe's ``precision``.
        activation_checkpointing: What the backward pass recomputes.

    Raises:
        ValueError: BF16 without a mesh; FSDP does the casting (a mesh of one rank will do).
    """
    apply_precision(model, precision)
    _checkpoint_activations(model, activation_checkpointing)
    if mesh is not None:
        _shard(model, mesh, precision)
    elif mixed_precision(precision).param_dtype is not None:
        raise ValueError("compute: bf16 needs a mesh, if only of one rank: FSDP casts the parameters")


def materialize(model: MoETransformer, device: torch.device | str, seed: int) -> None:
    """Allocate this rank's shard on ``device`` and give it its initial weights."""
    model.to_empty(device=device)
    init_weights(model, model.cfg.init.std, seed)


def _checkpoint_activations(model: MoETransformer, mode: ActivationCheckpointing) -> None:
    """Checkpoint each block's ``forward`` itself; a wrapper module would change the parameters' names."""
    if mode == ActivationCheckpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == ActivationCheckpointing.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _keep_products(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in GEMM_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(model: MoETransformer, mesh: DeviceMesh, precision: PrecisionConfig) -> None:
    mesh = dense_mesh(mesh)
    policy = mixed_precision(precision)
    for module in full_precision_modules(model, precision):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
