"""Rules between the keys of ``model.linear_attention`` and the rest of a model."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config.errors import Problem
from moefoundry.config.mesh_rules import divisors
from moefoundry.config.schema_linear_attention import INTERVAL_OF_FULL
from moefoundry.config.schema_model import ModelConfig

KEY = "model.linear_attention"


def linear_attention_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with a model's linear attention."""
    linear = model.linear_attention
    if linear is None:
        return
    if linear.n_value_heads % linear.n_key_heads:
        message = f"n_value_heads {linear.n_value_heads} is not divisible by {linear.n_key_heads} heads of keys"
        yield Problem(f"{KEY}.n_key_heads", message, allowed=divisors(linear.n_value_heads))
    if linear.layers is None:
        return
    if beyond := [index for index in linear.layers if index >= model.n_layers]:
        message = f"no block {', '.join(map(str, beyond))}, for model.n_layers is {model.n_layers}"
        yield Problem(f"{KEY}.layers", message, allowed=f"0 to {model.n_layers - 1}")
    if linear.full_attention_interval != INTERVAL_OF_FULL:
        message = f"{linear.full_attention_interval} has no effect, for {KEY}.layers lists the blocks"
        yield Problem(f"{KEY}.full_attention_interval", message, allowed=str(INTERVAL_OF_FULL))
