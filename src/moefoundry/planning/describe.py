"""Parameter counts of a recipe's model, from a build on meta tensors: nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moefoundry.config import ModelConfig
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.experts import GroupedExperts


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Attributes:
        total: All of them; a tied embedding counts once.
        active: Those a token meets: everything but the routed experts it is not sent to.
        routed_experts: Those of all routed experts.
        embedding: The input embedding (also in the others).
    """

    total: int
    active: int
    routed_experts: int
    embedding: int

    def __str__(self) -> str:
        return f"{_short(self.total)} parameters, {_short(self.active)} active"


def count_parameters(cfg: ModelConfig) -> ParameterCounts:
    """Count the parameters of the model that ``cfg`` declares."""
    with torch.device("meta"):
        return parameter_counts(MoETransformer(cfg))


def parameter_counts(model: MoETransformer) -> ParameterCounts:
    """Count the parameters of a model that is there, sharded or not."""
    moe = model.cfg.moe
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    routed = sum(parameter.numel() for module in experts for parameter in module.parameters())
    return ParameterCounts(
        total=total,
        active=total - routed + routed * moe.top_k // moe.num_experts,
        routed_experts=routed,
        embedding=model.embed_tokens.weight.numel(),
    )


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return str(count)
