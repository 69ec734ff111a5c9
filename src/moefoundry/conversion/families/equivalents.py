"""Models that compute exactly what another does, in terms that a family has.

A family may have a part that a model lacks, and that changes nothing at one of its values. Such a model is exported
with that value. No bit is lost: what is multiplied is multiplied by a power of two.

    biases of zero           a model without biases, in a family that has them
    a gate of one half       shared experts without a gate: sigmoid(0) is 1/2, and their output is doubled
    a scale in the experts   router.scale is 2 ** n, and the experts' outputs are multiplied by it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from moefoundry.config import AttentionBias, GqaConfig, ModelConfig


@dataclass(frozen=True)
class Equivalent:
    """A model that computes what a given one does.

    Tensors that it has beside the given one's are zeros.

    Attributes:
        cfg: The model.
        factors: End of a tensor's name -> power of two that the given one's values are multiplied by.
        changes: What differs, in a few words each; empty for the given model itself.
    """

    cfg: ModelConfig
    factors: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    def changed(self, cfg: ModelConfig, change: str, factors: Mapping[str, float] | None = None) -> Equivalent:
        """Add a change."""
        return Equivalent(cfg, {**self.factors, **(factors or {})}, (*self.changes, change))

    def factor(self, name: str) -> float:
        """Give what the values of a tensor are multiplied by, 1 for most."""
        return next((factor for end, factor in self.factors.items() if name.endswith(end)), 1.0)


def equivalents(cfg: ModelConfig) -> Iterator[Equivalent]:
    """Yield the model itself, then others that compute the same, those with the fewest changes first."""
    found = [Equivalent(cfg)]
    for step in (_scale_in_the_experts, _constant_gate, _zero_biases):
        found += [other for each in found for other in step(each)]
    return iter(sorted(found, key=lambda each: len(each.changes)))


def _zero_biases(same: Equivalent) -> Iterator[Equivalent]:
    attention = same.cfg.attention
    if not isinstance(attention, GqaConfig):
        return
    more = {
        AttentionBias.none: (AttentionBias.qkv, AttentionBias.all),
        AttentionBias.qkv: (AttentionBias.all,),
        AttentionBias.all: (),
    }
    for bias in more[attention.bias]:
        cfg = replace(same.cfg, attention=replace(attention, bias=bias))
        yield same.changed(cfg, f"attention.bias {bias.value}, of zeros")


def _constant_gate(same: Equivalent) -> Iterator[Equivalent]:
    moe = same.cfg.moe
    if moe.num_shared_experts and not moe.shared_expert_gate:
        cfg = replace(same.cfg, moe=replace(moe, shared_expert_gate=True))
        change = "moe.shared_expert_gate that is always 1/2, of shared experts times 2"
        yield same.changed(cfg, change, {".ffn.shared_experts.down_proj.weight": 2.0})


def _scale_in_the_experts(same: Equivalent) -> Iterator[Equivalent]:
    moe = same.cfg.moe
    scale = moe.router.scale
    if scale != 1.0 and math.frexp(scale)[0] == 0.5:
        cfg = replace(same.cfg, moe=replace(moe, router=replace(moe.router, scale=1.0)))
        ends = (".ffn.experts.down_proj", ".ffn.experts.down_proj_bias")
        yield same.changed(cfg, f"moe.router.scale {scale:g} in the experts", dict.fromkeys(ends, scale))


Fits = Callable[[ModelConfig], list[str]]


def fitting(cfg: ModelConfig, fits: Mapping[str, Fits]) -> tuple[str, Equivalent] | None:
    """Find the first model of :func:`equivalents` that one of these takes, and its name; or None.

    Args:
        cfg: The model.
        fits: Name of a family -> reasons why it cannot hold a model.
    """
    for same in equivalents(cfg):
        for name, reasons in fits.items():
            if not reasons(same.cfg):
                return name, same
    return None
