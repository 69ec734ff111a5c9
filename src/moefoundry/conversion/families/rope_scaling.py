"""Rotary embeddings of a Hugging Face config: their base, and YaRN or none.

    transformers 4   rope_theta: 1e6            rope_scaling: null, or {rope_type: yarn, factor: 8.0, ...}
    transformers 5   rope_parameters: {rope_theta: 1e6, rope_type: default, or yarn, factor: 8.0, ...}

Both are read. The older form is written, which transformers 5 reads as well, and transformers 4 passes over the newer.
"""

from __future__ import annotations

from typing import Any

from moefoundry.config import YarnConfig
from moefoundry.conversion.families.keys import Keys

NEW, OLD = "rope_parameters", "rope_scaling"
DEFAULTS = {"rope_type": "default", "beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(keys: Keys, older: Keys | None = None) -> tuple[float, YarnConfig | None]:
    """Read the base of the frequencies, and the YaRN that a config declares.

    YaRN's ``factor`` is taken as it stands, as YaRN's and DeepSeek's own code and transformers 5 do; transformers 4
    divides ``max_position_embeddings`` by the original length.

    Args:
        keys: The whole file.
        older: Mapping with ``rope_theta`` in the older form; None is ``keys``.
    """
    older = older or keys
    theta = older.number("rope_theta")
    yarn = _read_yarn(keys, OLD) if keys.has(OLD) else None
    if not keys.has(NEW):
        return theta, yarn
    newer = keys.nested(NEW, {**DEFAULTS, "rope_theta": theta})
    new_theta = newer.number("rope_theta")
    if older.stated("rope_theta") and new_theta != theta:
        older.refuse("rope_theta", f"{new_theta}, as {NEW}.rope_theta says")
    new_yarn = _read_yarn(keys, NEW, newer)
    if keys.has(OLD) and new_yarn != yarn:
        keys.refuse(OLD, f"what {NEW} says")
    return new_theta, new_yarn


def _read_yarn(keys: Keys, name: str, scaling: Keys | None = None) -> YarnConfig | None:
    """Read the mapping ``name``, which is ``scaling`` where it is open already."""
    scaling = scaling or keys.nested(name, DEFAULTS)
    spelling = "rope_type" if scaling.stated("rope_type") or not scaling.has("type") else "type"  # which is older
    scaling.skip("rope_type")
    kind = scaling.text(spelling, "yarn", "default")
    if kind is None:
        return None  # what the other keys of another kind mean is not known here
    scaling.only("type", kind)
    scaling.only("partial_rotary_factor", 1.0)
    yarn = _yarn(keys, scaling) if kind == "yarn" else None
    scaling.skip("beta_fast", "beta_slow")
    scaling.finish()
    return yarn


def _yarn(keys: Keys, scaling: Keys) -> YarnConfig:
    scaling.only("attention_factor", None)  # the paper's, which the other keys give
    scaling.only("truncate", True)
    original = "original_max_position_embeddings"
    return YarnConfig(
        factor=scaling.number("factor"),
        original_max_seq_len=(
            scaling.size(original) if scaling.has(original) else keys.size("max_position_embeddings")
        ),
        beta_fast=scaling.number("beta_fast"),
        beta_slow=scaling.number("beta_slow"),
        mscale=_magnitude(scaling, "mscale"),
        mscale_all_dim=_magnitude(scaling, "mscale_all_dim"),
    )


def write_yarn(yarn: YarnConfig | None) -> dict[str, Any] | None:
    """Write ``rope_scaling`` of a YaRN."""
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
    """Read a magnitude; 0 means none, as in DeepSeek's code."""
    return (scaling.number(key) or None) if scaling.has(key) else None
