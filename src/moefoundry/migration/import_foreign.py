"""Import checkpoints of Composer's trainer: an MPT that can be expressed here, or this project's own model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moefoundry.config import ModelConfig, UserError, load_model
from moefoundry.config.loader import LLM_FOUNDRY_MODELS
from moefoundry.conversion.convert import RECIPE, Summary, nbytes_of, say, write_weights
from moefoundry.conversion.starting_recipe import starting_recipe
from moefoundry.conversion.tensor_map import Dtype, Pieces, TensorMap
from moefoundry.data.staging import staged
from moefoundry.migration.composer_checkpoint import open_foreign
from moefoundry.migration.migrate import read_tree
from moefoundry.migration.mpt import OURS, Mpt
from moefoundry.migration.mpt_tensors import MptTensors, OurTensors
from moefoundry.model.transformer import meta_model

NATIVE = "moe_causal_lm"
TRANSFORMERS = ("_name_or_path", "architectures", "auto_map", "torch_dtype", "transformers_version", "model_type")


def import_foreign(path: Path, output: Path, dtype: Dtype = Dtype.keep, recipe: Path | None = None) -> Summary:
    """Write a weights-only checkpoint of one that Composer's trainer wrote, and a recipe that trains it.

    Args:
        path: A ``.pt`` file, or a directory of shards.
        output: Checkpoint directory to make.
        dtype: Type of the stored parameters.
        recipe: The recipe of LLM Foundry that it was trained with; None reads the config that is in the file.

    Raises:
        UserError: It cannot be read, names a class that does not belong there, or holds a model that cannot be
            expressed here; or ``output`` exists.
    """
    found = open_foreign(path)
    cfg, length, pieces = _model(path, found.config, recipe, list(found.tensors.specs))
    names = TensorMap(pieces, cfg)
    names.check_theirs(found.tensors.specs, path)
    names.check_copies(found.tensors, path)
    specs = names.our_specs(found.tensors.specs, dtype)
    say("the tokenizer is that of the recipe: give it to moefoundry prepare")
    with staged(output, nbytes_of(specs)) as staging:
        staging.mkdir()
        write_weights(staging, cfg, specs, names.our_blocks(found.tensors, specs), length)
        text = starting_recipe(cfg, output.name, f"Goes on with {path.name}", length, os.path.abspath(output))
        (staging / RECIPE).write_text(text)
    return Summary(output, len(specs), nbytes_of(specs), False)


def _model(
    path: Path, config: dict[str, Any] | None, recipe: Path | None, names: list[str]
) -> tuple[ModelConfig, int | None, Pieces]:
    """Find the model of a checkpoint, the tokens of its sequences, and the names of its tensors."""
    where, model = _keys(path, config, recipe)
    name = model.get("name")
    if name == NATIVE:
        cfg = load_model({key: value for key, value in model.items() if key not in ("name", "seed")})
        return cfg, None, OurTensors([*meta_model(cfg).state_dict()])
    if name != "mpt_causal_lm":
        known = isinstance(name, str) and LLM_FOUNDRY_MODELS.fullmatch(name)
        what = f"{name}: only mpt_causal_lm and {NATIVE} are imported" if known else "no recipe of LLM Foundry"
        raise UserError(f"{where}: model.name: {what}")
    mpt = Mpt(model)
    if mpt.reasons:
        reasons = "\n  ".join(f"model.{key}: {reason}" for key, reason in mpt.reasons.items())
        raise UserError(f"{where}: such a model cannot be expressed here:\n  {reasons}")
    fused = any(name.endswith("attn.Wqkv.weight") for name in names)
    return _config_of(mpt), model.get("max_seq_len", 2048), MptTensors(fused, mpt.ffn_type == OURS)


def _keys(path: Path, config: dict[str, Any] | None, recipe: Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the file that tells the model, and the keys of ``model`` in a recipe of LLM Foundry."""
    if recipe is not None:
        model = read_tree(recipe).get("model")
        return recipe, model if isinstance(model, dict) else {}
    if config is None:
        raise UserError(f"{path}: it does not tell its model; give the recipe that trained it: --recipe FILE")
    if config.get("model_type") != "mpt":
        kind = config.get("model_type")
        raise UserError(f"{path}: a model of the type {kind}; hf_checkpointer writes a directory that import takes")
    return path, {name: value for name, value in config.items() if name not in TRANSFORMERS} | {"name": "mpt_causal_lm"}


def _config_of(mpt: Mpt) -> ModelConfig:
    keys: dict[str, Any] = {}
    for path, (value, _, _) in mpt.native_keys().items():
        mapping = keys
        *above, leaf = path.split(".")
        for name in above:
            mapping = mapping.setdefault(name, {})
        mapping[leaf] = value
    return load_model(keys)
