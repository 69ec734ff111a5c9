"""Put adapters into a model, freeze the rest, and give the adapters their initial values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefoundry.adapters.adapter import AdaptedExperts, Adapter, ExpertAdapter, LinearAdapter, add_adapter
from moefoundry.config import ConfigError, LoraConfig
from moefoundry.config.lora_rules import target_problems
from moefoundry.model.init import fill_by_row
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.experts import GroupedExperts
from moefoundry.moe.layer import MoELayer


@dataclass(frozen=True)
class _Place:
    """A weight that may get an adapter: ``name`` of the module ``owner``, in a group of the recipe's targets."""

    group: str
    name: str
    owner: nn.Module


def apply_lora(model: MoETransformer, cfg: LoraConfig) -> None:
    """Freeze every parameter of ``model`` in place, and give the targets adapters, which train.

    Args:
        model: A new model, on any device, before ``parallelize``.
        cfg: The recipe's ``lora``.

    Raises:
        ConfigError: A target names no weight of the model, or none of them names any.
    """
    places = list(_places(model))
    known = {place.group for place in places} | {f"{place.group}.{place.name}" for place in places}
    if problems := target_problems(cfg, known):
        raise ConfigError(problems)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    scale = cfg.alpha / (math.sqrt(cfg.rank) if cfg.use_rslora else cfg.rank)
    with torch.device(model.embed_tokens.weight.device):
        for place in places:
            if {place.group, f"{place.group}.{place.name}"} & set(cfg.targets):
                _adapt(place, cfg, scale)
    for layer in model.layers:
        if cfg.train_router and isinstance(layer.ffn, MoELayer):
            layer.ffn.router.gate.weight.requires_grad_(True)


def has_adapter(module: nn.Module) -> bool:
    """Tell whether a module, or one inside it, has an adapter."""
    return any(isinstance(inner, Adapter) for inner in module.modules())


def trained_names(model: nn.Module) -> set[str]:
    """List the names of the parameters that train, and of the buffers: what a checkpoint of adapters holds."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name for name, _ in model.named_buffers()}


def adapter_names(model: nn.Module) -> set[str]:
    """List the names of the parameters of all adapters."""
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, Adapter)]
    return {f"{name}.{inner}" for name, adapter in adapters for inner, _ in adapter.named_parameters()}


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Fill every adapter in place: ``a`` from U(-1 / sqrt(I), 1 / sqrt(I)), ``b`` with 0, magnitudes by their weights.

    Values of ``a`` depend on the seed and the parameter's name alone, as those of all other weights do, so they are the
    same on every mesh.

    Args:
        model: Materialized, sharded or not, with its other weights filled.
        seed: Seed of the recipe.
    """
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            bound = module.a.shape[-1] ** -0.5
            fill_by_row(f"{name}.a", module.a, seed, partial(_fill_evenly, bound))
            module.b.zero_()
    start_magnitudes(model)


@torch.no_grad()
def start_magnitudes(model: nn.Module) -> None:
    """Set the magnitudes of DoRA to the lengths of the rows of their frozen weights, as they are now."""
    for linear in model.modules():
        adapter = getattr(linear, "lora", None)
        if isinstance(adapter, LinearAdapter) and adapter.magnitude is not None:
            rows, lengths = _local(cast(nn.Linear, linear).weight), _local(adapter.magnitude.weight)
            lengths.copy_(torch.linalg.vector_norm(rows.float(), dim=1))


def _fill_evenly(bound: float, row: Tensor, draw: torch.Generator) -> Tensor:
    return row.uniform_(-bound, bound, generator=draw)


def _local(tensor: Tensor) -> Tensor:
    """Give this rank's part; a weight and the lengths of its rows are sharded alike."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _places(model: MoETransformer) -> Iterator[_Place]:
    for layer in model.layers:
        yield from _linears("attention", layer.attention)
        if not isinstance(layer.ffn, MoELayer):
            yield from _linears("dense", layer.ffn)
            continue
        if layer.ffn.shared_experts is not None:
            yield from _linears("shared_experts", layer.ffn.shared_experts)
        for name, weight in layer.ffn.experts.named_parameters(recurse=False):
            if weight.dim() == 3:  # not a bias
                yield _Place("experts", name, layer.ffn.experts)


def _linears(group: str, module: nn.Module) -> Iterator[_Place]:
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            yield _Place(group, name, linear)


def _adapt(place: _Place, cfg: LoraConfig, scale: float) -> None:
    if isinstance(place.owner, GroupedExperts):
        experts = place.owner
        if type(experts) is GroupedExperts:
            experts.__class__ = AdaptedExperts
            cast(AdaptedExperts, experts).lora = nn.ModuleDict()
        shape = getattr(experts, place.name).shape
        adapted = cast(AdaptedExperts, experts)
        adapted.lora[place.name] = ExpertAdapter(shape, cfg.rank, scale, cfg.dropout, experts.product)
        return
    linear = cast(nn.Linear, place.owner)
    linear.lora = LinearAdapter(linear, cfg.rank, scale, cfg.dropout, cfg.dora)
    linear.register_forward_hook(add_adapter)
