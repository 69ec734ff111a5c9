"""Keys of ``model.moe.router`` of score functions that have keys of their own."""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config.field import key
from moefoundry.config.schema_model import RouterConfig


@dataclass
class SparseMixerConfig(RouterConfig):
    """SparseMixer (arXiv 2409.12136): experts are picked one after the other, each with a weight of its own."""

    score_function: str = key("sparsemixer", "Maps router logits to scores.", table="router_scores")
    normalize_topk: bool = key(False, "Divide the top-k weights by their sum.")
    margin: float = key(
        0.01,
        "Half the relative distance from the best logit within which experts may be picked, and share its softmax.",
        ge=0,
        lt=1,
        renamed_from=("jitter_eps",),
    )
    sampled: bool = key(
        True,
        "In training, draw each expert by its chance and estimate the gradient; false takes the best, with its own.",
        architecture=False,
    )

    @property
    def draws(self) -> bool:
        return super().draws or self.sampled
