"""The memory that steps of small models really take, as the kernels of a GPU would take it.

Everything is run and counted as it is, except what a CPU computes in another way than a GPU does: norms, attention and
FP8 formats are one kernel each there. Of these, results are counted and what is between is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

from moefoundry.config import Compute, Recipe
from moefoundry.config.making import make_part
from moefoundry.fp8_gather import held_by_fsdp
from moefoundry.mesh import build_meshes, resolve_degrees
from moefoundry.model import context
from moefoundry.ops import cpu_attention, cpu_norm
from moefoundry.ops.fp8 import GatheredBlocks, KeptBlocks, gemm, quantization, weights
from moefoundry.parallel import begin_micro_batch, materialize, parallelize
from tests.memory import PeakMemory, storage_of
from tests.planning.sharded import built

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FP8_KERNELS = (
    *(
        (quantization, f"{name}_reference")
        for name in ("quantize", "quantize_transposed", "dequantize", "retile", "quantize_columns")
    ),
    *((gemm, f"{name}_reference") for name in ("multiply", "wgrad")),
)


class Measured(NamedTuple):
    """Bytes of this rank."""

    parameters: int
    gradients: int
    moments: int
    peak: int


class GpuLike(PeakMemory):
    """Peak memory of operations, with the layouts and the inner buffers of a GPU's kernels.

    A GPU's attention gives its output in the layout of the projection after it, and takes fewer heads of keys and
    values than of queries as they are; in BF16 it takes windows and documents without a mask. Its logsumexp makes a
    copy of its input.
    """

    inside_attention = False

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        super().__init__(without)
        self._left_out: list[Tensor] = []

    def leave_out(self, tensor: Tensor) -> Tensor:
        """Keep a tensor, and do not count it."""
        self._left_out.append(tensor)
        self.without.add(storage_of(tensor)._cdata)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        if func is FLASH:
            out = (out[0].transpose(1, 2).contiguous().transpose(1, 2), *out[1:])
        if self.inside_attention and func is not FLASH and isinstance(out, Tensor):
            given = [arg for arg in args if isinstance(arg, Tensor)]
            self.note(out, share=min(1.0, given[0].numel() / out.numel()) if given and out.numel() else 1.0)
        else:
            self.note(out, beside=args[0].nbytes if func is aten.logsumexp.default else 0)
        return out


class _Norm(Function):
    """A norm as one kernel each way."""

    @staticmethod
    def forward(ctx: Any, memory: PeakMemory, norm: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.memory, ctx.norm = memory, norm
        with memory.paused():
            out = norm(*inputs)
        memory.note(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with ctx.memory.paused(), torch.enable_grad():
            gradients = torch.autograd.grad(ctx.norm(*inputs), inputs, grad)
        ctx.memory.note(gradients)
        return None, None, *gradients


class _Attention(Function):
    """Attention whose values are narrower than its queries, as one kernel each way; a CPU has none."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, memory: PeakMemory, options: dict[str, Any]) -> Tensor:
        width = v.shape[-1]
        options = options | {"attn_mask": _bias(options["attn_mask"], q.dtype, memory)}
        with memory.paused():
            wide, logs = FLASH(q, k, F.pad(v, (0, q.shape[-1] - width)), 0.0, **options)
            out = wide[..., :width].transpose(1, 2).contiguous().transpose(1, 2)
        memory.note(wide, share=width / wide.shape[-1])  # while checkpointing keeps it
        memory.note((out, logs))
        ctx.save_for_backward(q, k, v, out, logs, options.pop("attn_mask"))
        ctx.memory, ctx.options = memory, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logs, bias = ctx.saved_tensors
        with ctx.memory.paused():
            more = (0, q.shape[-1] - v.shape[-1])
            wide = [F.pad(x, more) for x in (grad, v, out)]
            grads = FLASH_BACKWARD(wide[0], q, k, *wide[1:], logs, 0.0, attn_mask=bias, **ctx.options)
            given = grads[0], grads[1], grads[2][..., : v.shape[-1]].contiguous()
        ctx.memory.note(given)
        return *given, None, None


def _bias(mask: Tensor | None, dtype: torch.dtype, memory: PeakMemory) -> Tensor | None:
    """What attention makes of a mask of booleans, and keeps for its backward pass."""
    if mask is None:
        return None
    with memory.paused():
        bias = _as_bias(mask, dtype)
    memory.note(bias)
    return bias


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


@contextmanager
def kernels_of_a_gpu(memory: GpuLike, narrow: bool) -> Iterator[None]:
    """Count norms, attention and FP8 formats as one kernel each; that of attention in BF16 (``narrow``) has no mask."""
    rms, layer, attention, masks = F.rms_norm, F.layer_norm, F.scaled_dot_product_attention, context._mask

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return _Norm.apply(memory, lambda x, weight: rms(x, shape, weight, eps), x, weight)

    def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        given = (x, weight) if bias is None else (x, weight, bias)
        return _Norm.apply(memory, lambda x, weight, bias=None: layer(x, shape, weight, bias, eps), *given)

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if v.shape[-1] < q.shape[-1]:
            return _Attention.apply(q, k, v, memory, {key: options[key] for key in ("is_causal", "attn_mask", "scale")})
        mask = options.get("attn_mask")
        if mask is not None and q.dtype == torch.bfloat16:
            with memory.paused():
                options["attn_mask"] = memory.leave_out(_as_bias(mask, q.dtype))
        memory.inside_attention = True
        try:
            return attention(q, k, v, **options)
        finally:
            memory.inside_attention = False

    def as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            with memory.paused():
                out = function(*args)
            memory.note(out if isinstance(out, Tensor) else out.tensors)
            return out

        return counted

    def mask_of(*given: Any) -> Tensor | None:
        if not narrow:
            return masks(*given)
        with memory.paused():
            mask = masks(*given)
        return None if mask is None else memory.leave_out(mask)

    with ExitStack() as patches:
        patches.enter_context(patch.object(context, "_mask", mask_of))
        for module in (cpu_attention, cpu_norm):
            patches.enter_context(patch.object(module, "takes", lambda *_: False))
        for name, function in (("rms_norm", rms_norm), ("layer_norm", layer_norm)):
            patches.enter_context(patch.object(F, name, function))
        patches.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        for module, name in FP8_KERNELS:
            patches.enter_context(patch.object(module, name, as_kernel(getattr(module, name))))
        yield


def measure(recipes: list[Recipe], memory_of: Callable[..., GpuLike] = GpuLike) -> list[Measured]:
    """Measure the second micro-batch of a step of each recipe, on this rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with patch.object(weights, "transposes", lambda *_: True):  # as on a GPU
        return [_measure(recipe, memory_of) for recipe in recipes]


def _measure(recipe: Recipe, memory_of: Callable[..., GpuLike]) -> Measured:
    degrees = resolve_degrees(recipe.mesh, dist.get_world_size(), 8)
    meshes = build_meshes(degrees, "cpu") if degrees.world_size > 1 else None
    model = built(recipe)
    parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
    materialize(model, "cpu", 0)
    sequences, length = recipe.device_train_microbatch_size, recipe.max_seq_len
    tokens = torch.arange(sequences * length).view(sequences, length) % recipe.model.vocab_size
    shards = [*model.parameters()]
    begin_micro_batch(model, False)
    model(tokens, tokens).total.backward()
    begin_micro_batch(model, True)
    parameters = [*shards, *narrow_copies_of(model), *kept_blocks_of(model)]
    memory = memory_of([*parameters, *model.buffers(), tokens])
    memory.note([*gradients_of(shards), *sums_of_a_copy(model), *whole_between_micro_batches(model)])
    with memory, kernels_of_a_gpu(memory, recipe.precision.compute == Compute.bf16):
        model(tokens, tokens).total.backward()
    gradients = bytes_of(gradients_of(shards))
    optimizer = make_part("optimizers", recipe.optimizer.name, "optimizer", recipe.optimizer, model, recipe)
    optimizer.step()
    state = [value for slots in optimizer.state.values() for name, value in slots.items() if name != "step"]
    return Measured(bytes_of(parameters), gradients, bytes_of(state), memory.peak - gradients)


def narrow_copies_of(model: nn.Module) -> list[Tensor]:
    """Copies that one rank multiplies by; a module holds them beside its parameters."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def kept_blocks_of(model: nn.Module) -> list[Tensor]:
    """Quantized weights that modules keep."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, KeptBlocks)]
    kept += [shard for blocks in kept if isinstance(blocks, GatheredBlocks) for shard in blocks.shards]
    return [tensor for blocks in kept for quantized in blocks.found.values() for tensor in quantized.tensors]


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients that there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def whole_between_micro_batches(model: nn.Module) -> list[Tensor]:
    """Parameters that FSDP has gathered, and sums of gradients that it has not reduced."""
    found: list[Tensor | None] = []
    for parameter in held_by_fsdp(model):
        if parameter.sharded_state == ShardedState.UNSHARDED:
            found.append(parameter.unsharded_param.data)
        unsharded = getattr(parameter, "_unsharded_param", None)
        found += [parameter.unsharded_accumulated_grad, None if unsharded is None else unsharded.grad]
    return [tensor for tensor in found if tensor is not None]


def sums_of_a_copy(model: nn.Module) -> list[Tensor]:
    """What FSDP has in place of gradients until they are summed over the copies of the model."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for state in states if (group := state._fsdp_param_group) is not None]
    return [group._partial_reduce_output for group in groups if group._partial_reduce_output is not None]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors on this rank; those that share one count once."""
    storages = {storage._cdata: storage.nbytes() for storage in map(storage_of, tensors)}
    return sum(storages.values())


def both_trackers(recipe: Recipe) -> tuple[int, int]:
    """The peak of what comes and goes in a step on one rank, by :class:`PeakMemory` and by torch's own tracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model = built(recipe)
    parallelize(model, None, recipe.precision, recipe.activation_checkpointing)
    materialize(model, "cpu", 0)
    tokens = torch.arange(recipe.max_seq_len).unsqueeze(0) % recipe.model.vocab_size
    model(tokens, tokens).total.backward()
    gradients = gradients_of(model.parameters())
    with PeakMemory([*model.parameters(), *model.buffers(), *gradients, tokens]) as ours:
        model(tokens, tokens).total.backward()
    tracker = MemTracker()
    tracker.track_external(model, tokens, *gradients)
    with tracker:
        model(tokens, tokens).total.backward()
    always = bytes_of([*model.parameters(), *model.buffers(), *gradients, tokens])
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return ours.peak, peak["Total"] - always
