"""``rope_scaling`` of a Hugging Face config: YaRN, or none."""

from __future__ import annotations

from typing import Any

from moefoundry.config import YarnConfig
from moefoundry.model.families.keys import Keys

DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_yarn(keys: Keys) -> YarnConfig | None:
    """The YaRN that a config declares. Its ``factor`` is taken as it stands, as YaRN's and DeepSeek's own code do;
    transformers divides ``max_position_embeddings`` by the original length."""
    if not keys.has("rope_scaling"):
        return None
    scaling = keys.nested("rope_scaling", DEFAULTS)
    spelling = "rope_type" if scaling.has("rope_type") else "type"  # the older one; files may have both
    if scaling.text(spelling, "yarn", "default") != "yarn":
        return None  # what the other keys of another kind mean is not known here
    scaling.only("type", "yarn")
    scaling.only("attention_factor", None)  # the paper's, which the other keys give
    original = "original_max_position_embeddings"
    yarn = YarnConfig(
        factor=scaling.number("factor"),
        original_max_seq_len=(
            scaling.size(original) if scaling.has(original) else keys.size("max_position_embeddings")
        ),
        beta_fast=scaling.number("beta_fast"),
        beta_slow=scaling.number("beta_slow"),
        mscale=_magnitude(scaling, "mscale"),
        mscale_all_dim=_magnitude(scaling, "mscale_all_dim"),
    )
    scaling.finish()
    return yarn


def write_yarn(yarn: YarnConfig | None) -> dict[str, Any] | None:
    """What :func:`read_yarn` reads."""
    if yarn is None:
        return None
    keys = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _magnitude(scaling: Keys, key: str) -> float | None:
    """0 is how DeepSeek's code says that there is none."""
    return (scaling.number(key) or None) if scaling.has(key) else None
