"""Model families: the map from a Hugging Face config and its tensors to ours, and back.

A family says what its config means in our recipe's terms, and which rows of a Hugging Face tensor are which of our
parameters. Nothing here reads or writes files. To add a family, write its file and name it here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.families.dbrx import Dbrx
from moefoundry.conversion.families.deepseek_v3 import DeepseekV3
from moefoundry.conversion.families.family import Family, Piece
from moefoundry.conversion.families.llama import Llama
from moefoundry.conversion.families.llama_moe import Mixtral, Olmoe
from moefoundry.conversion.families.qwen import Qwen2, Qwen3, Qwen3Moe

__all__ = ["FAMILIES", "Family", "Piece", "family_for", "family_of", "nearest_family"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (Llama(), Qwen2(), Qwen3(), Mixtral(), Olmoe(), Qwen3Moe(), DeepseekV3(), Dbrx())
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """Return the family of a ``config.json``.

    Raises:
        UserError: Its ``model_type`` is none of these.
    """
    model_type = hf.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    meant = [name for name in FAMILIES if _squashed(name) == _squashed(str(model_type))]
    hint = f"; did you mean {meant[0]!r}?" if meant else ""
    raise UserError(f"model_type {model_type!r} is not among the families: {', '.join(FAMILIES)}{hint}")


def _squashed(name: str) -> str:
    """Reduce a name to its letters and digits, in which its spellings agree."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def family_for(cfg: ModelConfig) -> Family:
    """Return the first family that has such a model.

    Raises:
        UserError: None has; the message gives the reasons for each.
    """
    reasons = {}
    for name, family in FAMILIES.items():
        reasons[name] = family.fits(cfg)
        if not reasons[name]:
            return family
    lines = "".join(f"\n  {name}: {'; '.join(texts)}" for name, texts in reasons.items())
    raise UserError(f"no Hugging Face family computes what this model does:{lines}")


def nearest_family(cfg: ModelConfig) -> tuple[Family, list[str]]:
    """Return the family that has such a model, or else the one with the fewest reasons against it, and these."""
    kin = [family for family in FAMILIES.values() if family.attention_kind == cfg.attention.kind]
    reasons = {family.name: family.fits(cfg) for family in kin}

    def distance(name: str) -> tuple[bool, int]:
        no_experts = f"model.n_dense_layers: {cfg.n_dense_layers}, and {name} has {cfg.n_layers}"
        return no_experts in reasons[name], len(reasons[name])

    nearest = min(reasons, key=distance)
    return FAMILIES[nearest], reasons[nearest]
