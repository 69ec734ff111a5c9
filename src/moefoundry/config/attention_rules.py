"""Rules between the keys of ``model.attention`` and the rest of a model."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config.errors import Problem
from moefoundry.config.schema_attention import GqaConfig
from moefoundry.config.schema_model import ModelConfig


def window_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with the list of blocks that have a sliding window."""
    attention, path = model.attention, "model.attention.sliding_window_layers"
    if not isinstance(attention, GqaConfig) or (blocks := attention.sliding_window_layers) is None:
        return
    if attention.sliding_window is None:
        yield Problem(path, "lists blocks, but model.attention.sliding_window is null", allowed="null")
    elif not blocks:
        yield Problem(path, "no block", allowed="null for all", suggestion="model.attention.sliding_window=null")
    elif beyond := [index for index in blocks if index >= model.n_layers]:
        message = f"no block {', '.join(map(str, beyond))}, for model.n_layers is {model.n_layers}"
        yield Problem(path, message, allowed=f"0 to {model.n_layers - 1}")
