"""Rules between ``model.moe.router`` and the rest of a model."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config.errors import Problem
from moefoundry.config.schema_model import MoEConfig
from moefoundry.config.schema_router import SparseMixerConfig


def picking_problems(moe: MoEConfig) -> Iterator[Problem]:
    """Yield the keys that choose experts beside a score function that picks them itself."""
    if not isinstance(moe.router, SparseMixerConfig):
        return
    message = f"has no part in the choice of model.moe.router.score_function={moe.router.score_function}"
    if moe.router.num_groups > 1:
        yield Problem("model.moe.router.num_groups", f"{moe.router.num_groups} {message}", allowed="1")
    if moe.balance.bias_update_rate:
        yield Problem("model.moe.balance.bias_update_rate", f"{moe.balance.bias_update_rate} {message}", allowed="0")
