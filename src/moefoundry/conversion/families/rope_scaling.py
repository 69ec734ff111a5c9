"""Rotary embeddings of a Hugging Face config: their base, the share of a head that turns, and an extension or none.

    transformers 4   rope_theta: 1e6            rope_scaling: null, or {rope_type: yarn, factor: 8.0, ...}
    transformers 5   rope_parameters: {rope_theta: 1e6, rope_type: default, or yarn, factor: 8.0, ...}

Extensions are YaRN, and ``llama3``, that of Llama 3.1 and later.

Both are read. The older form is written, which transformers 5 reads as well, and transformers 4 passes over the newer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moefoundry.config import AttentionConfig, Llama3RopeConfig, YarnConfig
from moefoundry.conversion.families.keys import Keys

NEW, OLD, FRACTION = "rope_parameters", "rope_scaling", "partial_rotary_factor"
DEFAULTS = {"rope_type": "default", "beta_fast": 32.0, "beta_slow": 1.0}


Scaling = YarnConfig | Llama3RopeConfig


class Rope(NamedTuple):
    """Rotary embeddings that a config declares.

    Attributes:
        theta: Base of the frequencies.
        scaling: Extension to longer contexts, or None.
        fraction: Share of a head that turns.
    """

    theta: float
    scaling: Scaling | None
    fraction: float

    @property
    def keys(self) -> dict[str, Any]:
        """Keys of an attention's config."""
        name = "llama3_rope" if isinstance(self.scaling, Llama3RopeConfig) else "yarn"
        return {"rope_theta": self.theta, name: self.scaling}


def read_rope(keys: Keys, older: Keys | None = None, partial: bool = False) -> Rope:
    """Read the rotary embeddings of a config.

    YaRN's ``factor`` is taken as it stands, as YaRN's and DeepSeek's own code and transformers 5 do; transformers 4
    divides ``max_position_embeddings`` by the original length.

    Args:
        keys: The whole file.
        older: Mapping with ``rope_theta`` in the older form; None is ``keys``.
        partial: The family has ``partial_rotary_factor``; any other than 1 is refused otherwise.
    """
    older = older or keys
    theta = older.number("rope_theta")
    fraction = keys.number(FRACTION) if partial and keys.has(FRACTION) else 1.0
    keys.only(FRACTION, fraction)
    scaling = _read_scaling(keys, OLD, fraction) if keys.has(OLD) else None
    if not keys.has(NEW):
        return Rope(theta, scaling, fraction)
    newer = keys.nested(NEW, {**DEFAULTS, "rope_theta": theta, FRACTION: fraction})
    if partial and not keys.stated(FRACTION):
        fraction = newer.number(FRACTION)
    new_theta = newer.number("rope_theta")
    if older.stated("rope_theta") and new_theta != theta:
        older.refuse("rope_theta", f"{new_theta}, as {NEW}.rope_theta says")
    new_scaling = _read_scaling(keys, NEW, fraction, newer)
    if keys.has(OLD) and new_scaling != scaling:
        keys.refuse(OLD, f"what {NEW} says")
    return Rope(new_theta, new_scaling, fraction)


def _read_scaling(keys: Keys, name: str, fraction: float, scaling: Keys | None = None) -> Scaling | None:
    """Read the mapping ``name``, which is ``scaling`` where it is open already."""
    scaling = scaling or keys.nested(name, DEFAULTS)
    spelling = "rope_type" if scaling.stated("rope_type") or not scaling.has("type") else "type"  # which is older
    scaling.skip("rope_type")
    kind = scaling.text(spelling, "yarn", "llama3", "default")
    if kind is None:
        return None  # what the other keys of another kind mean is not known here
    scaling.only("type", kind)
    scaling.only(FRACTION, fraction)
    found: Scaling | None = None
    if kind == "yarn":
        found = _yarn(keys, scaling)
    elif kind == "llama3":
        found = _llama3(scaling)
    scaling.skip("beta_fast", "beta_slow")
    scaling.finish()
    return found


def _llama3(scaling: Keys) -> Llama3RopeConfig:
    return Llama3RopeConfig(
        factor=scaling.number("factor"),
        original_max_seq_len=scaling.size("original_max_position_embeddings"),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
    )


def _yarn(keys: Keys, scaling: Keys) -> YarnConfig:
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
        attention_factor=scaling.number("attention_factor") if scaling.has("attention_factor") else None,
        truncate=scaling.flag("truncate") if scaling.has("truncate") else True,
    )


def write_scaling(attention: AttentionConfig) -> dict[str, Any] | None:
    """Write ``rope_scaling`` of an attention."""
    bands = attention.llama3_rope
    if bands is None:
        return write_yarn(attention.yarn)
    return {
        "rope_type": "llama3",
        "factor": bands.factor,
        "original_max_position_embeddings": bands.original_max_seq_len,
        "low_freq_factor": bands.low_freq_factor,
        "high_freq_factor": bands.high_freq_factor,
    }


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
        "attention_factor": yarn.attention_factor,
        "truncate": None if yarn.truncate else False,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _magnitude(scaling: Keys, key: str) -> float | None:
    """Read a magnitude; 0 means none, as in DeepSeek's code."""
    return (scaling.number(key) or None) if scaling.has(key) else None
