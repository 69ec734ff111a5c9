"""Transform the single-device model into a distributed one, in the one order that works.

    precision -> expert parallelism -> activation checkpointing -> compilation -> FSDP, or narrow copies on one device

The model is built on meta, then transformed, then materialized: each rank allocates and fills only its own shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from moefoundry.adapters import Adapter, init_adapters
from moefoundry.config import ActivationCheckpointing, Dispatcher, Fp8Recipe, Gather, MoEConfig, PrecisionConfig, Reduce
from moefoundry.fp8_gather import gather_in_fp8
from moefoundry.fp8_weights import Fp8Weights
from moefoundry.mesh import Meshes
from moefoundry.model.init import init_weights
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.deep_ep import Buffers, DeepEpDispatcher
from moefoundry.moe.dispatch import AllToAllDispatcher, TokenDispatcher
from moefoundry.moe.experts import GroupedExperts
from moefoundry.moe.layer import MoELayer
from moefoundry.moe.two_hop import TwoHopDispatcher
from moefoundry.narrow_copies import NarrowCopies
from moefoundry.ops import quack_experts
from moefoundry.ops.all_to_all import EXCHANGE_OPS
from moefoundry.ops.fp8.gemm import MULTIPLY_OP
from moefoundry.ops.fused_experts import operators
from moefoundry.ops.recompute import ATTENTION_OPS, keeping, keeping_nothing
from moefoundry.ops.sizes import REDUCTIONS
from moefoundry.ops.wide_linear import PRODUCT_OP
from moefoundry.precision import apply_precision, codec_of_rows, full_precision_modules, mixed_precision

_aten = torch.ops.aten
PRODUCT_OPS = frozenset(
    {_aten.mm.default, _aten.addmm.default, _aten._grouped_mm.default, MULTIPLY_OP, PRODUCT_OP},
)
KEPT_OPS = EXCHANGE_OPS | ATTENTION_OPS | PRODUCT_OPS | operators.MIXTURE_OPS | quack_experts.MIXTURE_OPS
"""Operators whose results ``selective`` keeps: products, attention and exchanges. Norms, activations and reorders are
recomputed. Compiled code has its products in buffers of its own, which are not kept."""

COMPILED_VARIANTS = 64
"""Variants that a part may be compiled in: layers share them, with their windows, lengths, training and generation."""


def parallelize(
    model: MoETransformer,
    meshes: Meshes | None,
    precision: PrecisionConfig,
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    compile: bool = False,
) -> None:
    """Transform ``model`` in place.

    Args:
        model: A new model, on any device.
        meshes: From ``mesh.build_meshes``; None leaves the model on one device, unsharded.
        precision: The recipe's ``precision``.
        activation_checkpointing: The recipe's ``activation_checkpointing``.
        compile: Compile the parts of each block.
    """
    apply_precision(model, precision)
    if meshes is not None and meshes.expert.size() > 1:
        _divide_experts(model, meshes)
    if meshes is not None and model.step_counts is not None:
        model.step_counts.group = dist.group.WORLD  # every rank is a data-parallel rank
    if activation_checkpointing != ActivationCheckpointing.none:
        _checkpoint_activations(model, activation_checkpointing)
    elif precision.fp8.recipe == Fp8Recipe.deepseek_v3:
        _recompute_up_projections(model)
    if compile:
        _compile(model, activation_checkpointing)
    if meshes is not None:
        _shard(model, meshes, precision)
    elif (dtype := mixed_precision(precision).param_dtype) is not None:
        NarrowCopies(model, dtype, full_precision_modules(model, precision))
    Fp8Weights(model, _with_whole_weights(model, meshes), gather_in_fp8(model) if precision.fp8.fsdp_all_gather else ())


def _with_whole_weights(model: MoETransformer, meshes: Meshes | None) -> Iterator[nn.Module]:
    """Yield the modules whose weights, between passes, this rank has whole, or as whole as it uses them."""
    divided = meshes is not None and meshes.expert.size() > 1
    for module in model.modules():
        mesh = None if meshes is None else meshes.dense
        if meshes is not None and divided and isinstance(module, GroupedExperts):
            mesh = meshes.expert_fsdp
        if mesh is None or mesh.size(-1) == 1:
            yield module


def materialize(model: MoETransformer, device: torch.device | str, seed: int) -> None:
    """Allocate this rank's shard on ``device`` and give it its initial weights."""
    model.to_empty(device=device)
    init_weights(model, model.cfg.init.std, seed)
    init_adapters(model, seed)


def _divide_experts(model: MoETransformer, meshes: Meshes) -> None:
    """Give each rank of the expert axis its share of every layer's experts, and each layer its dispatcher."""
    buffers = Buffers(meshes.expert.get_group())
    for layer in moe_layers(model):
        for module in layer.experts.modules():  # adapters, too
            for name, weight in module.named_parameters(recurse=False):
                share = distribute_tensor(weight.detach(), meshes.expert, [Shard(0)])
                module.register_parameter(name, nn.Parameter(share, requires_grad=weight.requires_grad))
        layer.dispatcher = _dispatcher(model.cfg.moe, layer.experts, meshes, buffers)


def _dispatcher(cfg: MoEConfig, experts: GroupedExperts, meshes: Meshes, buffers: Buffers) -> TokenDispatcher:
    if cfg.dispatcher == Dispatcher.deepep:
        return DeepEpDispatcher(cfg.num_experts, buffers)
    group, hops = meshes.expert.get_group(), meshes.expert_hops
    dispatcher = (
        AllToAllDispatcher(cfg.num_experts, group)
        if hops is None
        else TwoHopDispatcher(cfg.num_experts, group, *(mesh.get_group() for mesh in hops))
    )
    dispatcher.codec = codec_of_rows(experts)
    return dispatcher


def _checkpoint_activations(model: MoETransformer, mode: ActivationCheckpointing) -> None:
    """Checkpoint each block's ``forward`` itself; a wrapper module would change the parameters' names."""
    draws = model.cfg.moe.router.draws or any(
        isinstance(module, Adapter) and module.dropout.p > 0 for module in model.modules()
    )
    contexts = keeping(KEPT_OPS) if mode == ActivationCheckpointing.selective else keeping_nothing
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws, "context_fn": contexts}
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _recompute_up_projections(model: MoETransformer) -> None:
    for block in model.blocks:
        block.attention.recompute_up_projections = True


def _compile(model: MoETransformer, mode: ActivationCheckpointing) -> None:
    """Compile the parts of each block that are between exchanges.

    A whole block has no single graph: the host reads the sizes of exchanges, and checkpointing wraps the block.
    ``selective`` keeps results of operators inside compiled code, which knows nothing of it: it must not write other
    values into their memory.
    """
    keeps = mode == ActivationCheckpointing.selective
    options = {"inplace_buffers": False, "allow_buffer_reuse": False} if keeps else None
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_VARIANTS)
    for block in model.blocks:
        ffn = block.ffn
        parts = [ffn.router, ffn.shared_experts] if isinstance(ffn, MoELayer) else [ffn]
        for module in (block.attention, *parts):
            if module is not None:
                module.compile(options=options)


def _shard(model: MoETransformer, meshes: Meshes, precision: PrecisionConfig) -> None:
    policy = mixed_precision(precision)
    shard = partial(fully_shard, reshard_after_forward=meshes.gather == Gather.each_pass)
    # with cast inputs, gates would keep wide copies, and the weights of rows would be rounded on some meshes only
    wide = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    of_experts = replace(policy, cast_forward_inputs=False)
    for module in full_precision_modules(model, precision):
        shard(module, mesh=meshes.dense, mp_policy=wide)
    if meshes.expert.size() > 1:
        for layer in moe_layers(model):
            place = partial(_placement_of_experts, ranks=meshes.expert_fsdp.size(-1))
            shard(layer.experts, mesh=meshes.expert_fsdp, mp_policy=of_experts, shard_placement_fn=place)
            register_fsdp_forward_method(layer.experts, "in_chunks")
            cast(FSDPModule, layer.experts).set_all_reduce_hook(partial(_divide, number=meshes.expert.size()))
    for block in model.blocks:
        shard(block, mesh=meshes.dense, mp_policy=policy)
    for module in model.mtp:
        shard(module, mesh=meshes.dense, mp_policy=policy)
    if not model.cfg.tie_embeddings:
        embedding = shard(model.embed_tokens, mesh=meshes.dense, mp_policy=policy)
        embedding.set_unshard_in_backward(False)  # its gradient does not need it
    fully_shard(model, mesh=meshes.dense, mp_policy=policy)  # stays whole: the backward pass begins with it
    model.gather, model.reduce = meshes.gather, meshes.reduce
    _prefetch(model)
    if (limit := getattr(model, "set_reduce_scatter_max_input_buffers", None)) is not None:  # from torch 2.14 on
        cast(Callable[[int], None], limit)(REDUCTIONS)


def _divide(gradients: Tensor, number: int) -> None:
    """Divide what FSDP has reduced of experts that ``number`` ranks share.

    They see the tokens of all these ranks, so their gradient is a sum where every other gradient is a mean over ranks.
    FSDP calls this in a stream in which it then adds them up. It may free them while that stream still does so, and
    they are of another stream's memory, which would be given to the next gradients (pytorch 180900).
    """
    gradients.div_(number)
    if gradients.is_cuda:
        gradients.record_stream(torch.cuda.current_stream())


def _placement_of_experts(weight: nn.Parameter, ranks: int) -> Shard:
    """Shard whole experts among the ranks, or, if there are fewer experts than ranks, a part of each on every rank.

    So every rank has a share, and no shard is padded.
    """
    experts, rows = (weight.to_local() if isinstance(weight, DTensor) else weight).shape[:2]
    return Shard(1) if ranks > experts and rows % ranks == 0 else Shard(0)


def _prefetch(model: MoETransformer) -> None:
    """Gather the next block's parameters, and its experts, while a block computes.

    By default FSDP starts to gather experts only when their block has come to them, after a wait of the host, and the
    first block of a pass likewise. Modules of multi-token prediction are gathered ahead in the backward pass alone: an
    evaluation does not have them, and would leave them gathered.
    """
    root, layers = _fsdp_units(model)[:1], [_fsdp_units(block) for block in model.layers]
    further = [_fsdp_units(module) for module in model.mtp]
    for this, following in pairwise([root, *layers]):
        beside = _fsdp_units(model.embed_tokens) if this is root else []
        this[0].set_modules_to_forward_prefetch([*beside, *following])
    for this, following in pairwise([*layers, *further, root]):
        following[0].set_modules_to_backward_prefetch(this)


def _fsdp_units(part: nn.Module) -> list[FSDPModule]:
    """List the FSDP units of a part of the model, outermost first."""
    return [module for module in part.modules() if isinstance(module, FSDPModule)]


def begin_micro_batch(model: nn.Module, last: bool) -> None:
    """Tell FSDP if the next micro-batch is the last of its step.

    Only then are gradients summed over ``replicate``; before, each copy adds up its own in its shards. Where gradients
    are reduced once a step, or parameters gathered once, that is then, too.
    """
    for whole in (module for module in model.modules() if isinstance(module, MoETransformer)):
        for unit in _fsdp_units(whole):
            unit.set_requires_gradient_sync(last or whole.reduce == Reduce.each_micro_batch, recurse=False)
            unit.set_requires_all_reduce(last, recurse=False)  # the one before sets it, too
            unit.set_reshard_after_backward(last or whole.gather == Gather.each_pass, recurse=False)


def moe_layers(model: MoETransformer) -> list[MoELayer]:
    """List the MoE layers in order; those of multi-token prediction are last."""
    return [block.ffn for block in model.blocks if isinstance(block.ffn, MoELayer)]


def moe_layer_indices(model: MoETransformer) -> list[int]:
    """List the index among the model's blocks of each of :func:`moe_layers`."""
    return [index for index, block in enumerate(model.blocks) if isinstance(block.ffn, MoELayer)]
