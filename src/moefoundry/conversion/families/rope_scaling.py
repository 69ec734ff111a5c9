"""Rotary embeddings of a Hugging Face config: their base, the share of a head that turns, and an extension or none.

    transformers 4   rope_theta: 1e6            rope_scaling: null, or {rope_type: yarn, factor: 8.0, ...}
    transformers 5   rope_parameters: {rope_theta: 1e6, rope_type: default, or yarn, factor: 8.0, ...}

    of each kind     rope_parameters: {full_attention: {rope_theta: ...}, sliding_attention: {rope_theta: ...}}

Extensions are YaRN, and ``llama3``, that of Llama 3.1 and later; of Phi's models LongRoPE, and no other.

Both are read. The older form is written, which transformers 5 reads as well, and transformers 4 passes over the newer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moefoundry.config import (
    AttentionConfig,
    GqaConfig,
    Llama3RopeConfig,
    LongRopeConfig,
    YarnConfig,
)
from moefoundry.conversion.families.keys import Keys

NEW, OLD, FRACTION = "rope_parameters", "rope_scaling", "partial_rotary_factor"
KINDS = ("full_attention", "sliding_attention")
DEFAULTS = {"rope_type": "default", "beta_fast": 32.0, "beta_slow": 1.0}
EXTENSIONS = ("yarn", "llama3")
ORIGINAL = "original_max_position_embeddings"
Scaling = YarnConfig | Llama3RopeConfig | LongRopeConfig


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
            "longrope": self.scaling if isinstance(self.scaling, LongRopeConfig) else None,
        }


def read_rope(
    keys: Keys, older: Keys | None = None, partial: bool = False, kinds: tuple[str, ...] = EXTENSIONS
) -> Rope:
    """Read the rotary embeddings of a config.

    YaRN's ``factor`` is taken as it stands, as YaRN's and DeepSeek's own code and transformers 5 do; transformers 4
    divides ``max_position_embeddings`` by the original length.

    Args:
        keys: The whole file.
        older: Mapping with ``rope_theta`` in the older form; None is ``keys``.
        partial: The family has ``partial_rotary_factor``; any other than 1 is refused otherwise.
        kinds: Extensions that the family has.
    """
    older = older or keys
    theta = older.number("rope_theta")
    fraction = keys.number(FRACTION) if partial and keys.has(FRACTION) else 1.0
    keys.only(FRACTION, fraction)
    scaling = _read_scaling(keys, OLD, fraction, kinds=kinds) if keys.has(OLD) else None
    if not keys.has(NEW):
        return Rope(theta, scaling, fraction)
    newer = keys.nested(NEW, {**DEFAULTS, "rope_theta": theta, FRACTION: fraction})
    if partial and not keys.stated(FRACTION):
        fraction = newer.number(FRACTION)
    found = Rope(newer.number("rope_theta"), _read_scaling(keys, NEW, fraction, newer, kinds), fraction)
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
    if found[1].scaling is not None and found[1] != found[0]:
        both.refuse(KINDS[1], f"no extension, or what {KINDS[0]} says")
    both.finish()
    _refuse_another(keys, keys, older, found[0], f"{NEW}.{KINDS[0]}")
    return found[0], found[1]


def _refuse_another(keys: Keys, with_theta: Keys, older: Rope, newer: Rope, name: str) -> None:
    """Refuse the older form where it says something else than the newer, the mapping ``name``."""
    if with_theta.stated("rope_theta") and newer.theta != older.theta:
        with_theta.refuse("rope_theta", f"{newer.theta}, as {name}.rope_theta says")
    if keys.has(OLD) and newer.scaling != older.scaling:
        keys.refuse(OLD, f"what {name} says")


def _read_scaling(
    keys: Keys, name: str, fraction: float, scaling: Keys | None = None, kinds: tuple[str, ...] = EXTENSIONS
) -> Scaling | None:
    """Read the mapping ``name``, which is ``scaling`` where it is open already."""
    scaling = scaling or keys.nested(name, DEFAULTS)
    spelling = "rope_type" if scaling.stated("rope_type") or not scaling.has("type") else "type"  # which is older
    scaling.skip("rope_type")
    kind = scaling.text(spelling, *kinds, "default")
    if kind is None:
        return None  # what the other keys of another kind mean is not known here
    scaling.only("type", kind)
    scaling.only(FRACTION, fraction)
    found: Scaling | None = None
    if kind == "yarn":
        found = _yarn(keys, scaling)
    elif kind == "llama3":
        found = _llama3(scaling)
    elif kind == "longrope":
        found = _longrope(scaling)
    scaling.skip("beta_fast", "beta_slow")
    scaling.finish()
    return found


def _llama3(scaling: Keys) -> Llama3RopeConfig:
    return Llama3RopeConfig(
        factor=scaling.number("factor"),
        original_max_seq_len=scaling.size(ORIGINAL),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
    )


def _longrope(scaling: Keys) -> LongRopeConfig:
    scaling.skip("factor", "attention_factor")  # of magnitudes that are not given
    return LongRopeConfig(
        original_max_seq_len=scaling.size(ORIGINAL),
        short_factors=scaling.numbers("short_factor"),
        long_factors=scaling.numbers("long_factor"),
        short_magnitude=scaling.number("short_mscale"),
        long_magnitude=scaling.number("long_mscale"),
    )


def _yarn(keys: Keys, scaling: Keys) -> YarnConfig:
    return YarnConfig(
        factor=scaling.number("factor"),
        original_max_seq_len=(
            scaling.size(ORIGINAL) if scaling.has(ORIGINAL) else keys.size("max_position_embeddings")
        ),
        beta_fast=scaling.number("beta_fast"),
        beta_slow=scaling.number("beta_slow"),
        mscale=_magnitude(scaling, "mscale"),
        mscale_all_dim=_magnitude(scaling, "mscale_all_dim"),
        attention_factor=scaling.number("attention_factor") if scaling.has("attention_factor") else None,
        truncate=scaling.flag("truncate") if scaling.has("truncate") else True,
    )


def write_scaling(attention: AttentionConfig) -> dict[str, Any] | None:
    """Write ``rope_scaling`` of an attention; none of a LongRoPE, which few families have."""
    bands = attention.llama3_rope
    if bands is None:
        return write_yarn(attention.yarn)
    return {
        "rope_type": "llama3",
        "factor": bands.factor,
        ORIGINAL: bands.original_max_seq_len,
        "low_freq_factor": bands.low_freq_factor,
        "high_freq_factor": bands.high_freq_factor,
    }


def write_longrope(longrope: LongRopeConfig | None) -> dict[str, Any] | None:
    """Write ``rope_scaling`` of a LongRoPE, as Phi's models have it."""
    if longrope is None:
        return None
    return {
        "rope_type": "longrope",
        ORIGINAL: longrope.original_max_seq_len,
        "short_factor": longrope.short_factors,
        "long_factor": longrope.long_factors,
        "short_mscale": longrope.short_magnitude,
        "long_mscale": longrope.long_magnitude,
    }


def write_ropes(attention: GqaConfig) -> dict[str, Any]:
    """Write ``rope_parameters`` of each kind of blocks."""
    ropes = attention, attention.rope_of(attention.sliding_window)
    return {
        kind: {"rope_theta": rope.rope_theta, **(write_scaling(rope) or {"rope_type": "default"})}
        for kind, rope in zip(KINDS, ropes, strict=True)
    }


def write_yarn(yarn: YarnConfig | None) -> dict[str, Any] | None:
    """Write ``rope_scaling`` of a YaRN."""
    if yarn is None:
        return None
    keys = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        ORIGINAL: yarn.original_max_seq_len,
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
