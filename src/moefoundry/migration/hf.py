"""A Hugging Face model on this machine as ``model`` here, by its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.families import family_of
from moefoundry.conversion.starting_recipe import stated, with_balance
from moefoundry.migration.draft import Draft


def read_model(place: Any, changes: dict[str, Any]) -> tuple[ModelConfig | None, str]:
    """Read the config of a local Hugging Face directory.

    Args:
        place: The directory, as a recipe names it; perhaps the name of a model elsewhere.
        changes: Keys that a recipe sets in the config.

    Returns:
        The model; or None, and the reason.
    """
    directory = Path(str(place))
    if not directory.is_dir():
        return None, f"{place}: not on this machine; download it, and name the directory"
    from moefoundry.conversion.hf_directory import read_hf_config  # imports torch

    try:
        config = _merged(read_hf_config(directory), changes)
        family = family_of(config)
        return with_balance(family, family.model_of(config), config), ""
    except UserError as error:
        return None, " ".join(str(error).split())


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def put_model(draft: Draft, cfg: ModelConfig, old: str) -> None:
    """Set the keys of ``model`` to those of a config; ``old`` is the key that names the directory."""
    for path, value in stated(cfg, "model"):
        draft.put(path, value, why=f"config.json of {old}")


def put_weights(draft: Draft, place: Any, old: str, name: str) -> None:
    """Let training go on from the weights of a Hugging Face directory, once they are imported."""
    target = f"weights/{name}"
    draft.put("load_path", target, old, "imported weights")
    draft.put("load_weights_only", True, why="counters, schedule and data begin anew")
    draft.notes.append(f"weights: moefoundry convert import {place} -o {target}")
