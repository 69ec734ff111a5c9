"""Rotary embeddings of a Hugging Face config: their base, the share of a head that turns, and an extension or none.

    transformers 4   rope_theta: 1e6            rope_scaling: null, or {rope_type: yarn, factor: 8.0, ...}
    transformers 5   rope_parameters: {rope_theta: 1e6, rope_type: default, or yarn, factor: 8.0, ...}

    of each kind     rope_parameters: {full_attention: {rope_theta: ...}, sliding_attention: {rope_theta: ...}}

Extensions are YaRN, and ``llama3``, that of Llama 3.1 and later.

Both are read. The older form is written, which transformers 5 reads as well, and transformers 4 passes over the newer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moefoundry.config import AttentionConfig, GqaConfig, Llama3RopeConfig, WindowRopeConfig, YarnConfig
from moefoundry.conversion.families.keys import Keys

NEW, OLD, FRACTION = "rope_parameters", "rope_scaling", "partial_rotary_factor"
KINDS = ("full_attention", "sliding_attention")
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
        return {
            "rope_theta": self.theta,
            "yarn": self.scaling if isinstance(self.scaling, YarnConfig) else None,
            "llama3_rope": self.scaling if isinstance(self.scaling, Llama3RopeConfig) else None,
        }


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
    found = Rope(newer.number("rope_theta"), _read_scaling(keys, NEW, fraction, newer), fraction)
    _refuse_another(keys, older, Rope(theta, scaling, fraction), found, NEW)
    return found


def read_ropes(keys: Keys) -> tuple[Rope, Rope]:
    """Read the rotary embeddings of blocks that see all, and of those with a window.

    The older form has one base for both, and extends those of the first kind only.
    """
    theta = keys.number("rope_theta")
    plain = Rope(theta, None, 1.0)
    older = Rope(theta, _read_scaling(keys, OLD, 1.0) if keys.has(OLD) else None, 1.0)
    if not keys.has(NEW):
        return older, plain
    both, found = keys.nested(NEW, {}), []
    for kind in KINDS:
        newer = both.nested(kind, {**DEFAULTS, "rope_theta": theta})
        found.append(Rope(newer.number("rope_theta"), _read_scaling(keys, kind, 1.0, newer), 1.0))
    both.finish()
    _refuse_another(keys, keys, older, found[0], f"{NEW}.{KINDS[0]}")
    return found[0], found[1]


def _refuse_another(keys: Keys, with_theta: Keys, older: Rope, newer: Rope, name: str) -> None:
    """Refuse the older form where it says something else than the newer, the mapping ``name``."""
    if with_theta.stated("rope_theta") and newer.theta != older.theta:
        with_theta.refuse("rope_theta", f"{newer.theta}, as {name}.rope_theta says")
    if keys.has(OLD) and newer.scaling != older.scaling:
        keys.refuse(OLD, f"what {name} says")


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


def write_scaling(attention: AttentionConfig | WindowRopeConfig) -> dict[str, Any] | None:
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


def write_ropes(attention: GqaConfig) -> dict[str, Any]:
    """Write ``rope_parameters`` of each kind of blocks."""
    of_windows = attention.sliding_window_rope or attention
    return {kind: _parameters(rope) for kind, rope in zip(KINDS, (attention, of_windows), strict=True)}


def _parameters(rope: AttentionConfig | WindowRopeConfig) -> dict[str, Any]:
    return {"rope_theta": rope.rope_theta, **(write_scaling(rope) or {"rope_type": "default"})}


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
