"""AdamW, with moments in fp32 or BF16.

BF16 moments take half the memory, and checkpoints 8 bytes a parameter instead of 12. As in DeepSeek-V3 (arXiv
2412.19437, section 3.3.3), master weights and gradients stay FP32. A step is torch's fused fp32 AdamW on moments cast
to fp32, which are then rounded again; this rounding is the only difference from ``torch.optim.AdamW(fused=True)``.
Torch itself takes BF16 moments of FP32 parameters only in the CUDA kernel of its later versions (2.14, not 2.11), and
rounds only to the nearest. On a GPU a kernel of our own does all of it (``ops/adamw_kernel.py``). Elsewhere moments are
cast a bounded number of elements at a time, those of small tensors together, on the rank's own shards.

Rounding to the nearest loses a change smaller than half a unit in the last place, which is between 2**-9 and 2**-8 of
the value. ``exp_avg_sq`` changes by (1 - beta2)(g**2 - exp_avg_sq). So it does not change while g**2 differs from it by
less than 4 to 8% with beta2 0.95, or 20 to 39% with 0.99. Above 1 - 2**-8 = 0.996 it may not fall even without any
gradient; the recipe's checks refuse that. Stochastic rounding is right on average with any beta2.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from torch.optim import AdamW
from torch.optim.adamw import adamw

from moefoundry.config import AdamWConfig, Moments, Recipe
from moefoundry.mesh import by_mesh
from moefoundry.ops.kernel_choice import kernels_run
from moefoundry.ops.stochastic_rounding import hash_bits, lower_half, round_stochastically, upper_half

WIDE_ELEMENTS = 2**22
"""Elements of each moment that are fp32 at a time without a kernel: 32 MiB for both moments; three times that with
random bits."""


def adamw_of_recipe(cfg: AdamWConfig, model: nn.Module, recipe: Recipe) -> AdamW:
    """Make the optimizer of a recipe with ``optimizer.name: adamw``."""
    return build_adamw(model, cfg, recipe.precision.optimizer_moments, recipe.seed)


def build_adamw(model: nn.Module, cfg: AdamWConfig, moments: Moments = Moments.fp32, seed: int = 0) -> AdamW:
    """Make AdamW for a model.

    Args:
        model: Materialized model.
        cfg: The recipe's ``optimizer``.
        moments: Dtype and rounding of the moments.
        seed: Seed of stochastic rounding.
    """
    groups, betas = parameter_groups(model, cfg.weight_decay), (cfg.betas[0], cfg.betas[1])
    if moments == Moments.fp32:
        return ShardAdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    named = [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups]
    return Bf16MomentsAdamW(named, cfg.lr, betas, cfg.eps, seed if moments == Moments.bf16_stochastic else None)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters that train by mesh and weight decay."""
    decayed, plain = by_decay(model)
    return [*groups_of(decayed.values(), weight_decay), *groups_of(plain.values(), 0.0)]


def by_decay(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Divide the parameters that train into weight matrices, which decay, and norms, biases and embeddings."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and id(parameter) not in embeddings and not name.endswith("bias")
            (decayed if decays else plain)[name] = parameter
    return decayed, plain


def groups_of(parameters: Iterable[nn.Parameter], weight_decay: float, **options: Any) -> list[dict[str, Any]]:
    """Make an optimizer's groups of parameters, one for each mesh."""
    return [{"params": params, "weight_decay": weight_decay, **options} for params in by_mesh(parameters)]


class ShardAdamW(AdamW):
    """``torch.optim.AdamW`` for parameters that may be DTensors, of which it updates the rank's own shards.

    The update of an element needs no other element, so the results are the same, to the last bit. Torch would first
    find out for each tensor how the operation is divided.
    """

    def _init_group(self, group: dict[str, Any], *tensors: list[Tensor]) -> bool:
        has_complex: bool = super()._init_group(group, *tensors)
        for same_kind in tensors:
            same_kind[:] = map(shard_of, same_kind)
        return has_complex


class Bf16MomentsAdamW(AdamW):
    """AdamW for fp32 parameters, plain or DTensors, with ``exp_avg`` and ``exp_avg_sq`` in BF16.

    Args:
        groups: Parameter groups of *named* parameters, as in ``{"params": [("head.weight", head.weight)], ...}``, each
            with its ``weight_decay``.
        lr: As in ``torch.optim.AdamW``, and likewise the next two.
        betas: Decay of both moments.
        eps: Added to the root of the second moment.
        seed: Seed of stochastic rounding, whose bits depend only on the seed, the parameter's name, the step and the
            element's index in the whole tensor: they are the same on every mesh, and after a resume. None rounds to the
            nearest.

    Raises:
        ValueError: A parameter is not fp32 or has no name.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int | None = None,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self.seed = seed
        for group in self.param_groups:
            if "param_names" not in group:
                raise ValueError("parameters need names: {'params': [(name, parameter), ...]}")
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.dtype != torch.float32:
                    raise ValueError(f"{name} is {parameter.dtype}; master weights are fp32")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Cast the moments back to BF16: ``load_state_dict`` has cast them to the parameter's dtype."""
        super().__setstate__(state)
        for slots in self.state.values():
            slots["step"] = slots["step"].cpu()
            for name in ("exp_avg", "exp_avg_sq"):
                slots[name] = slots[name].to(torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for fused, pieces in groupby(self._pieces(group), key=lambda piece: kernels_run(piece.parameter.device)):
                if fused:
                    _update_by_kernel(pieces, group, self.seed is not None)
                    continue
                for batch in _batches(pieces):
                    _update(batch, group, self.seed is not None)
        return loss

    def _pieces(self, group: dict[str, Any]) -> Iterator[_Piece]:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # on the host, which reads it
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            steps_before = int(state["step"].item())
            state["step"] += 1
            digest = hashlib.sha256(f"moments/{self.seed}/{name}/{steps_before}".encode()).digest()
            first_counter = int.from_bytes(digest[:4], "little")
            stored = [shard_of(tensor).view(-1) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
            tensors = [shard_of(parameter.grad).reshape(-1), *stored]
            start, most = 0, sys.maxsize if kernels_run(tensors[0].device) else WIDE_ELEMENTS
            for run in _runs_of(parameter):
                for done in range(0, run.size, most):
                    part = slice(start + done, start + min(done + most, run.size))
                    yield _Piece(steps_before, first_counter + run.first + done, *(t[part] for t in tensors))
                start += run.size


class _Piece(NamedTuple):
    """Some elements of a parameter, 1-D, with their gradient and moments.

    Attributes:
        steps_before: Number of their updates so far.
        counter: Counter of the first element for random bits; those of the others follow.
    """

    steps_before: int
    counter: int
    gradient: Tensor
    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class _Run(NamedTuple):
    """Elements of a shard that are contiguous in the whole tensor, too.

    Attributes:
        size: Number of elements.
        first: Index of the first in the whole tensor.
    """

    size: int
    first: int


def shard_of(tensor: Tensor) -> Tensor:
    """Give this rank's part of a tensor, all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _runs_of(parameter: Tensor) -> Sequence[_Run]:
    if isinstance(parameter, DTensor):
        return _runs(parameter.shape, parameter.device_mesh, parameter.placements)
    return [_Run(parameter.numel(), 0)]


@lru_cache(maxsize=256)  # layers are alike
def _runs(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Sequence[_Run]:
    """List a shard's runs in order: the elements from its last divided dim on are one run."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is in the mesh of its parameters"
    sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh.shape, list(coordinate), placements)
    strides = [shape[dim + 1 :].numel() for dim in range(len(shape))]
    divided = max((dim for dim, size in enumerate(sizes) if size != shape[dim]), default=0)
    run_size = torch.Size(sizes[divided:]).numel()
    if not run_size:
        return []
    firsts = [sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))]
    for dim in range(divided):
        firsts = [first + index * strides[dim] for first in firsts for index in range(sizes[dim])]
    return [_Run(run_size, first) for first in firsts]


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Batch pieces that are updated together: equal ``steps_before``, at most ``WIDE_ELEMENTS`` elements."""
    batch: list[_Piece] = []
    elements = 0
    for piece in pieces:
        elements += piece.parameter.numel()
        if batch and (elements > WIDE_ELEMENTS or piece.steps_before != batch[0].steps_before):
            yield batch
            batch, elements = [], piece.parameter.numel()
        batch.append(piece)
    if batch:
        yield batch


def _update(pieces: Sequence[_Piece], group: dict[str, Any], stochastic: bool) -> None:
    sizes = [piece.parameter.numel() for piece in pieces]
    device = pieces[0].parameter.device
    stored = [piece.exp_avg for piece in pieces], [piece.exp_avg_sq for piece in pieces]
    wide = torch.empty(2, sum(sizes), device=device)
    exp_avgs, exp_avg_sqs = (list(moment.split(sizes)) for moment in wide)
    torch._foreach_copy_(exp_avgs, stored[0])
    torch._foreach_copy_(exp_avg_sqs, stored[1])
    adamw(
        [piece.parameter for piece in pieces],
        [piece.gradient for piece in pieces],
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs=[],
        state_steps=list(torch.full((len(pieces),), float(pieces[0].steps_before), device=device).unbind()),
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    if stochastic:
        bits = hash_bits(_counters(pieces, sizes, device))
        torch._foreach_copy_(stored[0], round_stochastically(wide[0], lower_half(bits)).split(sizes))
        torch._foreach_copy_(stored[1], round_stochastically(wide[1], upper_half(bits)).split(sizes))
    else:
        torch._foreach_copy_(stored[0], exp_avgs)
        torch._foreach_copy_(stored[1], exp_avg_sqs)


def _update_by_kernel(pieces: Iterable[_Piece], group: dict[str, Any], stochastic: bool) -> None:
    from moefoundry.ops.adamw_kernel import Update, update_

    beta1, beta2 = group["betas"]
    update = Update(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    for steps_before, counter, gradient, *stored in pieces:
        update_(stored[0], gradient, stored[1], stored[2], update, steps_before, counter if stochastic else None)


def _counters(pieces: Sequence[_Piece], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Make a counter for each element of the pieces, in their order; int32."""
    places = torch.arange(max(sizes), dtype=torch.int32, device=device)
    counters = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    for piece, size, out in zip(pieces, sizes, counters.split(sizes), strict=True):
        first = (piece.counter + 2**31) % 2**32 - 2**31  # int32 wraps around
        torch.add(places[:size], first, out=out)
    return counters
