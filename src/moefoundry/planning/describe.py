"""Parameter counts of a recipe's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moefoundry.config import LoraConfig, ModelConfig
from moefoundry.planning.weights import Weight, all_blocks, mtp_weights, root_weights


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


def count_parameters(cfg: ModelConfig, lora: LoraConfig | None = None) -> ParameterCounts:
    """Count the parameters of the model that ``cfg`` declares, with the adapters of ``lora``."""
    blocks, frozen = all_blocks(cfg, lora), lora is not None
    layers, further = blocks[: cfg.n_layers], blocks[cfg.n_layers :]
    of_mtp = cfg.mtp.depth * _numel(mtp_weights(cfg)) + sum(map(_numel, further))
    root = _numel(root_weights(cfg))
    total = root + sum(map(_numel, layers))
    routed = sum(weight.numel for block in layers for weight in block if weight.of_experts)
    still = sum(map(_still, blocks)) + _still(root_weights(cfg)) + cfg.mtp.depth * _still(mtp_weights(cfg))
    return ParameterCounts(
        total=total,
        active=total - routed + routed * cfg.moe.top_k // cfg.moe.num_experts,
        routed_experts=routed,
        embedding=cfg.vocab_size * cfg.d_model,
        mtp=of_mtp,
        frozen=sum(map(_still, layers)) + root + of_mtp if frozen else still,
    )


def _numel(weights: Sequence[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def _still(weights: Sequence[Weight]) -> int:
    return sum(weight.numel for weight in weights if not weight.trained)


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return str(count)
