"""Add adapters to their weights, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from moefoundry.adapters.adapter import AdaptedExperts, Adapter, LinearAdapter, add_adapter
from moefoundry.moe.experts import GroupedExperts


class Adapted(NamedTuple):
    """A weight with an adapter."""

    weight: Tensor
    adapter: Adapter


def adapted_weights(model: nn.Module) -> Iterator[Adapted]:
    """Yield each weight of ``model`` that has an adapter, with it."""
    for module in model.modules():
        if isinstance(module, AdaptedExperts):
            for name, adapter in module.lora.items():
                yield Adapted(getattr(module, name), adapter)  # type: ignore[arg-type]  # a ModuleDict of adapters
        elif isinstance(module, nn.Linear) and isinstance(own := getattr(module, "lora", None), LinearAdapter):
            yield Adapted(module.weight, own)


def magnitude_of(adapter: Adapter) -> Tensor | None:
    """Give the lengths of the rows, [O], that an adapter of a linear layer trains; None without DoRA."""
    magnitude = getattr(adapter, "magnitude", None)
    return None if magnitude is None else magnitude.weight


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute ``scale * b @ a``, [..., O, I], in fp32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return b.to(wide) @ (a.to(wide) * scale)


def adapted(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """Compute the weight that a frozen weight and its adapter make up, in fp32 or wider.

    Args:
        weight: [..., O, I], or some of its rows.
        a: [..., R, I].
        b: [..., O, R], of the same rows.
        scale: Scale of the adapter.
        magnitude: [O], lengths of the rows, with DoRA.
    """
    merged = weight + delta(a, b, scale)
    if magnitude is None:
        return merged
    return merged * (magnitude / torch.linalg.vector_norm(merged, dim=-1)).unsqueeze(-1)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its weight in place; the adapters stay as they are, so compute with :func:`unloaded`.

    Args:
        model: On one device, not sharded.
    """
    for weight, adapter in adapted_weights(model):
        weight.copy_(adapted(weight, adapter.a, adapter.b, adapter.scale, magnitude_of(adapter)))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Subtract every adapter from its weight in place, which undoes :func:`merge` to rounding.

    Raises:
        ValueError: An adapter has magnitudes (DoRA), of which merging does not keep the lengths before.
    """
    for weight, adapter in adapted_weights(model):
        if magnitude_of(adapter) is not None:
            raise ValueError("adapters with magnitudes (DoRA) cannot be taken out again; load the base anew")
        weight.sub_(delta(adapter.a, adapter.b, adapter.scale))


def unloaded(model: nn.Module) -> nn.Module:
    """Take the adapters out of ``model`` in place, and give it back, a plain model again; weights stay as they are."""
    for module in list(model.modules()):
        if isinstance(module, AdaptedExperts):
            del module.lora
            cast(nn.Module, module).__class__ = GroupedExperts
        elif isinstance(getattr(module, "lora", None), LinearAdapter):
            del module.lora
            hooks = module._forward_hooks
            for handle in [handle for handle, hook in hooks.items() if hook is add_adapter]:
                del hooks[handle]
    return model
