"""Windows in three of four blocks, or in those that ``layer_types`` names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moefoundry.config import GqaConfig, ModelConfig, WindowRopeConfig
from moefoundry.conversion.families.family import with_fewest_window_keys
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import layer_types, windowed_blocks
from moefoundry.conversion.families.rope_scaling import Rope

EVERY = 4  # of so many blocks the last one sees all


def read_windows(keys: Keys, attention: GqaConfig, of_windows: Rope | None = None) -> GqaConfig:
    """Read which blocks have a window, and how wide it is.

    Args:
        keys: The whole file.
        attention: Attention of the blocks that see all.
        of_windows: Rotary embedding of the blocks with a window; None is that of the others.
    """
    n_layers = keys.size("num_hidden_layers")
    listed = keys.stated("layer_types")
    blocks = windowed_blocks(keys, n_layers) if listed else [i for i in range(n_layers) if (i + 1) % EVERY]
    if not blocks:
        keys.skip("sliding_window")
        return attention
    windowed = replace(
        attention,
        sliding_window=keys.size("sliding_window"),
        sliding_window_layers=blocks,
        sliding_window_rope=of_windows and WindowRopeConfig(**of_windows.keys),
    )
    return with_fewest_window_keys(windowed, n_layers)


def write_windows(cfg: ModelConfig) -> dict[str, Any]:
    """Write what :func:`read_windows` reads."""
    assert isinstance(cfg.attention, GqaConfig)
    return {
        "sliding_window": cfg.attention.sliding_window,
        "layer_types": layer_types(cfg.attention, cfg.n_layers),
    }
