"""Model families: the map from a Hugging Face config and its tensors to ours, and back.

A family is data: a ``config.json`` in our recipe's terms, and which rows of which Hugging Face tensor are which of our
parameters. Nothing here reads or writes files. To add one, write its file and list it in
:mod:`moefoundry.config.parts`; a package of yours may add one, too (``docs/extending.md``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from moefoundry.config import ModelConfig, UserError
from moefoundry.config.making import make_part
from moefoundry.config.parts import TABLES
from moefoundry.conversion.families.equivalents import Equivalent, fitting
from moefoundry.conversion.families.family import Family, Piece

__all__ = ["FAMILIES", "Family", "Piece", "exports_as", "family_for", "family_of", "holder_of", "nearest_family"]


class Families(Mapping[str, Family]):
    """All families by name: listed ones, then those of installed packages; each is imported when it is asked for."""

    def __getitem__(self, name: str) -> Family:
        if name not in TABLES["families"].names():
            raise KeyError(name)
        return _family(name)

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES["families"].names())

    def __len__(self) -> int:
        return len(TABLES["families"].names())


FAMILIES = Families()
OTHER_NAMES = {"kimi_k2": "deepseek_v3", "qwen3_5_moe": "qwen3_5_moe_text", "bailing_moe_v2": "bailing_moe"}
"""A ``model_type`` that says what a family says, and is exported under the family's name."""


@cache
def _family(name: str) -> Family:
    made: Family = make_part("families", name, "model family")
    if made.name != name:
        raise UserError(f"model family: {name}: its package calls it {made.name!r}")
    return made


def family_of(hf: Mapping[str, Any]) -> Family:
    """Find the family of a ``config.json``.

    Raises:
        UserError: Its ``model_type`` is none of these.
    """
    model_type = hf.get("model_type")
    model_type = OTHER_NAMES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    meant = [name for name in FAMILIES if _squashed(name) == _squashed(str(model_type))]
    hint = f"; did you mean {meant[0]!r}?" if meant else ""
    shown = f"{model_type!r:.80}"
    raise UserError(f"model_type {shown} is not among the families: {', '.join(FAMILIES)}{hint}")


def _squashed(name: str) -> str:
    """Reduce a name to its letters and digits, in which its spellings agree."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def family_for(cfg: ModelConfig) -> Family:
    """Find the first family that has such a model.

    Raises:
        UserError: There is none; the message names what stands in the way of each.
    """
    for family in FAMILIES.values():
        if not family.fits(cfg):
            return family
    raise _no_family(cfg)


def _no_family(cfg: ModelConfig) -> UserError:
    lines = "".join(f"\n  {name}: {'; '.join(family.fits(cfg))}" for name, family in FAMILIES.items())
    return UserError(f"no Hugging Face family computes what this model does:{lines}")


def holder_of(cfg: ModelConfig, name: str | None = None) -> tuple[Family, Equivalent]:
    """Find the first family that has such a model, or one that computes exactly the same, and that model.

    Args:
        cfg: The model.
        name: The one family to ask; None asks all.

    Raises:
        UserError: There is none; the message names what stands in the way of each.
    """
    asked = FAMILIES if name is None else {name: FAMILIES[name]}
    found = fitting(cfg, {each: family.fits for each, family in asked.items()})
    if found is not None:
        return FAMILIES[found[0]], found[1]
    if name is not None:
        return FAMILIES[name], Equivalent(cfg)  # whose reasons the config's writer names
    raise _no_family(cfg)


def nearest_family(cfg: ModelConfig) -> tuple[Family | None, list[str]]:
    """Find the family that has such a model, or else the one in whose way least stands, and list what does.

    Returns:
        None and the reason, where no family has the model's kind of attention.
    """
    kin = [family for family in FAMILIES.values() if family.attention_kind == cfg.attention.kind]
    if not kin:
        return None, [f"model.attention.kind: no family has {cfg.attention.kind}"]
    reasons = {family.name: family.fits(cfg) for family in kin}

    def distance(name: str) -> tuple[bool, int]:
        no_experts = f"model.n_dense_layers: {cfg.n_dense_layers}, and {name} has {cfg.n_layers}"
        return no_experts in reasons[name], len(reasons[name])

    nearest = min(reasons, key=distance)
    return FAMILIES[nearest], reasons[nearest]


def exports_as(cfg: ModelConfig) -> str:
    """Name the Hugging Face family that has such a model, or the keys that stand in the way of the nearest."""
    found = fitting(cfg, {name: family.fits for name, family in FAMILIES.items()})
    if found is None:
        return f"no Hugging Face family: {'; '.join(nearest_family(cfg)[1])}"
    name, same = found
    return f"{name}, which computes the same with {' and '.join(same.changes)}" if same.changes else name
