"""Parameter counts of a recipe's model, from a build on meta tensors, which allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config import ModelConfig
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.moe.layer import MoELayer


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Attributes:
        total: Parameters without ``mtp``; a tied embedding counts once.
        active: Parameters that compute one token: ``total`` without the routed experts that it is not sent to.
        routed_experts: Parameters of all routed experts.
        embedding: Parameters of the input embedding, also counted in the others.
        mtp: Parameters of multi-token prediction, which only training uses.
        frozen: Parameters that do not train, of ``total`` and ``mtp``: with ``lora`` all but the adapters.
    """

    total: int
    active: int
    routed_experts: int
    embedding: int
    mtp: int = 0
    frozen: int = 0

    def __str__(self) -> str:
        part = f", {_short(self.total + self.mtp - self.frozen)} trained" if self.frozen else ""
        further = f", and {_short(self.mtp)} for multi-token prediction" if self.mtp else ""
        return f"{_short(self.total)} parameters, {_short(self.active)} active{part}{further}"


def count_parameters(cfg: ModelConfig) -> ParameterCounts:
    """Count the parameters of the model that ``cfg`` declares."""
    return parameter_counts(meta_model(cfg))


def parameter_counts(model: MoETransformer) -> ParameterCounts:
    """Count the parameters of a built model, sharded or not."""
    moe = model.cfg.moe
    mtp = sum(parameter.numel() for module in model.mtp for parameter in module.parameters())
    total = sum(parameter.numel() for parameter in model.parameters()) - mtp
    experts = [layer.ffn.experts for layer in model.layers if isinstance(layer.ffn, MoELayer)]
    routed = sum(parameter.numel() for module in experts for parameter in module.parameters())
    return ParameterCounts(
        total=total,
        active=total - routed + routed * moe.top_k // moe.num_experts,
        routed_experts=routed,
        embedding=model.embed_tokens.weight.numel(),
        mtp=mtp,
        frozen=sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
    )


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return str(count)
