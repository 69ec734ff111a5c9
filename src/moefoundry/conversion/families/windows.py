"""Windows in three of four blocks, or in those that ``layer_types`` names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moefoundry.config import GqaConfig, ModelConfig
from moefoundry.conversion.families.family import with_fewest_window_keys
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import layer_types, windowed_blocks
from moefoundry.conversion.families.rope_scaling import Rope

EVERY = 4  # of so many blocks the last one sees all


def read_windows(
    keys: Keys, attention: GqaConfig, of_windows: Rope | None = None, every: int | None = EVERY
) -> GqaConfig:
    """Read which blocks have a window, and how wide it is.

    Args:
        keys: The whole file.
        attention: Attention of the blocks that see all.
        of_windows: Rotary embedding of the blocks with a window; None is that of the others.
        every: Blocks of which the last sees all, where the file does not list them; None has no window then.
    """
    n_layers = keys.size("num_hidden_layers")
    if keys.stated("layer_types"):
        blocks = windowed_blocks(keys, n_layers)
    else:
        blocks = [index for index in range(n_layers) if (index + 1) % (every or 1)]
    if not blocks:
        keys.skip("sliding_window")
        return attention
    attention = replace(attention, sliding_window=keys.size("sliding_window"), sliding_window_layers=blocks)
    if of_windows is None or of_windows.keys.items() <= vars(attention).items():
        return with_fewest_window_keys(attention, n_layers)
    return with_fewest_window_keys(replace(attention, sliding_window_rope_theta=of_windows.theta), n_layers)


def without_rotation(attention: GqaConfig, n_layers: int) -> GqaConfig:
    """Leave out the rotary embedding of the blocks that see all."""
    return replace(attention, unrotated_layers=[i for i in range(n_layers) if attention.window_of(i) is None])


def write_windows(cfg: ModelConfig) -> dict[str, Any]:
    """Write what :func:`read_windows` reads."""
    assert isinstance(cfg.attention, GqaConfig)
    return {
        "sliding_window": cfg.attention.sliding_window,
        "layer_types": layer_types(cfg.attention, cfg.n_layers),
    }
