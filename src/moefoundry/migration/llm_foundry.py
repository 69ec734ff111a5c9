"""Recipes of LLM Foundry: a native recipe where the model can be expressed here, else LLM Foundry's, made current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefoundry.config.loader import LLM_FOUNDRY_MODELS
from moefoundry.llm_foundry.fates import FATES
from moefoundry.llm_foundry.keys import MAPPING, TRAIN_KEYS
from moefoundry.llm_foundry.recipe import FoundryRecipe
from moefoundry.migration.draft import Draft, check_kinds, model_name
from moefoundry.migration.finish import finish
from moefoundry.migration.hf import put_model, put_weights, read_model
from moefoundry.migration.kept import keep
from moefoundry.migration.loaders import move_eval_loader, move_loader, move_tokenizer
from moefoundry.migration.lora import move_lora
from moefoundry.migration.mpt import Mpt, move_mpt
from moefoundry.migration.report import Migration
from moefoundry.migration.training import (
    CALLBACKS,
    move_clipping,
    move_duration,
    move_evaluation,
    move_optimizer,
    move_parts,
    move_precision,
    move_saving,
    move_scheduler,
    move_sharding,
)

KIND = "LLM Foundry"
NUMBERS = ("optimizer.lr", "optimizer.weight_decay", "model.peft_config.lora_alpha", "model.peft_config.lora_dropout")
TASK_KEYS = (
    "icl_tasks",
    "icl_seq_len",
    "icl_subset_num_batches",
    "eval_gauntlet",
)
FOR_LLM_FOUNDRY = {
    "use_auth_token": "nothing is downloaded",
    "trust_remote_code": "no code of a model runs",
    "init_device": "weights are made where they lie",
    "use_flash_attention_2": "attention is computed by what the device has",
    "attn_implementation": "attention is computed by what the device has",
    "load_in_8bit": "weights are not quantized; precision.fp8 computes in FP8",
    "peft_type": "the adapter is LoRA",
    "task_type": "the model is a causal language model",
    "use_train_metrics": "metrics.jsonl has the loss of each batch",
    "additional_eval_metrics": "metrics.jsonl has the losses",
}


def is_llm_foundrys(tree: dict[str, Any]) -> bool:
    """Tell a recipe of LLM Foundry by ``model.name``."""
    name = model_name(tree)
    return isinstance(name, str) and LLM_FOUNDRY_MODELS.fullmatch(name) is not None


def migrate(path: Path, written: dict[str, Any], tree: dict[str, Any]) -> Migration:
    """Turn a recipe of LLM Foundry into one of this project, or into one that needs no change any more.

    Args:
        path: The file.
        written: Its keys and values, interpolations as they were written.
        tree: The same, interpolations resolved.
    """
    check_kinds(tree, NUMBERS, [name for name, kind in TRAIN_KEYS.items() if kind == MAPPING])
    model, recipe = tree["model"], FoundryRecipe(str(path), written)
    draft = Draft(tree)
    if model["name"] == "mpt_causal_lm":
        mpt = Mpt(model)
        if mpt.reasons:
            return keep(recipe, tree, {f"model.{key}": why for key, why in mpt.reasons.items()}, mpt)
        move_mpt(draft, mpt)
    elif model["name"] == "hf_causal_lm":
        place = model.get("pretrained_model_name_or_path")
        cfg, reason = read_model(place, model.get("config_overrides") or {})
        if cfg is None:
            return keep(recipe, tree, {"model.pretrained_model_name_or_path": reason})
        _move_hf(draft, cfg, path.stem)
    else:
        return keep(recipe, tree, {"model.name": f"{model['name']}: such models are LLM Foundry's alone"})
    _move_all(draft, tree, path.stem)
    return finish(draft, str(path), f"{KIND} ({model['name']})")


def _move_hf(draft: Draft, cfg: Any, name: str) -> None:
    place = "model.pretrained_model_name_or_path"
    put_model(draft, cfg, place)
    if draft.value("model.pretrained", True):
        put_weights(draft, draft.old[place], place, name)
        draft.silence("load_path", "load_weights_only")
    else:
        draft.drop(place, "its config.json was read")
    draft.silence("model.name", "model.pretrained")
    for path in draft.below("model.config_overrides"):
        draft.same("model", path, "read with the config")
    move_lora(draft, "model.peft_config.")
    for path in draft.below("model"):
        if draft.old[path] in (None, False):
            draft.silence(path)
        else:
            draft.move(path, FOR_LLM_FOUNDRY)


def _move_all(draft: Draft, tree: dict[str, Any], name: str) -> None:
    """Move every section but ``model``."""
    run_name = draft.value("run_name", name)
    draft.put("run_name", run_name, "run_name" if draft.value("run_name") else "", "the name of the file")
    draft.silence("run_name", "variables", "model.name")
    move_tokenizer(draft)
    move_loader(draft, "train_loader", run_name)
    move_evaluation(draft)
    if draft.new.get("eval_loader", ...) is not None:
        move_eval_loader(draft, tree, run_name)
    move_optimizer(draft, str(draft.value("optimizer.name", "")), "optimizer")
    move_scheduler(draft, str(draft.value("scheduler.name", "")), "scheduler")
    move_precision(draft, default="amp_bf16")
    move_sharding(draft, "fsdp_config")
    move_clipping(draft)
    for section in ("algorithms", "callbacks", "loggers"):
        move_parts(draft, section, CALLBACKS)
    for path in ("max_duration", "save_interval", "console_log_interval"):
        move_duration(draft, path)
    _put_defaults(draft)
    move_saving(draft)
    for path in [path for path in draft.old if path.partition(".")[0] in FATES]:
        section = path.partition(".")[0]
        if path in draft.below(section):
            _move_top(draft, path, section)
    draft.move_rest()


def _put_defaults(draft: Draft) -> None:
    """Say what LLM Foundry has as its default where it is another one here."""
    why = "LLM Foundry's default"
    if draft.value("console_log_interval") is None:
        draft.put("console_log_interval", "1ba", why=why)
    if draft.value("progress_bar") is None:
        draft.put("progress_bar", False, why=why)
    if draft.value("save_folder") is not None and draft.value("save_num_checkpoints_to_keep") is None:
        draft.put("save_num_checkpoints_to_keep", -1, why=why)


def _move_top(draft: Draft, path: str, section: str) -> None:
    fate = FATES[section]
    if draft.old[path] in (None, {}, []):
        draft.silence(path)
    elif fate.ours or path == section:
        draft.move(path, new=path if section in TASK_KEYS else "") if fate.ours else draft.drop(path, fate.text)
    else:
        draft.drop(path, fate.text)
