"""Recipes of axolotl: a flat mapping, steps and epochs as numbers, and the Hugging Face trainer's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefoundry.migration.draft import Draft, check_kinds
from moefoundry.migration.finish import finish
from moefoundry.migration.hf import put_model, put_weights, read_model
from moefoundry.migration.lora import move_lora
from moefoundry.migration.names import fitting_value
from moefoundry.migration.report import Migration

KIND = "axolotl"
QUANTIZED = "weights are not quantized; precision.fp8 computes in FP8"
KERNELS = "attention is computed by what the device has"
DATA = "`moefoundry prepare` reads the documents once"
NO_CODE = "no code of a model runs"
REASONS = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_config_kwargs"), QUANTIZED),
    **dict.fromkeys(("flash_attention", "sdp_attention", "xformers_attention", "attn_implementation"), KERNELS),
    **dict.fromkeys(("flex_attention", "eager_attention"), KERNELS),
    **dict.fromkeys(("dataset_prepared_path", "shuffle_merged_datasets", "dataset_processes", "test_datasets"), DATA),
    **dict.fromkeys(("datasets", "chat_template", "special_tokens", "tokens", "pretraining_dataset"), DATA),
    **dict.fromkeys(("tokenizer_type", "tokenizer_config", "tokenizer_use_fast", "tokenizer_legacy"), DATA),
    **dict.fromkeys(("pad_to_sequence_len", "eval_sample_packing", "group_by_length", "train_on_inputs"), DATA),
    "val_set_size": "prepare --val-fraction holds documents out",
    **dict.fromkeys(("model_type", "is_falcon_derived_model", "is_mistral_derived_model"), "the config tells it"),
    **dict.fromkeys(("trust_remote_code", "plugins"), NO_CODE),
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "push_dataset_to_hub", "hf_use_auth_token"), "nothing is uploaded"
    ),
    "model_config": "the family's config is read from the model",
    "adapter": "`lora` says so",
    "lora_model_dir": "load_path names adapters that were trained here",
    **dict.fromkeys(("wandb_watch", "wandb_log_model", "wandb_mode"), "the environment of wandb says so"),
    **dict.fromkeys(("loss_watchdog_threshold", "loss_watchdog_patience"), "nonfinite and callbacks.early_stopper"),
    "tf32": "fp32 products are exact",
    "fsdp_config": "mesh.shard says how many ranks share a copy",
    "unfrozen_parameters": "all weights train, or LoRA's alone",
    "gradient_checkpointing_kwargs": "checkpointing is without reentrance",
    "early_stopping_patience": "callbacks.early_stopper says so",
    "resume_from_checkpoint": "autoresume=true goes on with the run's newest checkpoint",
}
UNITS = {
    "max_steps": ("max_duration", "ba"),
    "num_epochs": ("max_duration", "ep"),
    "warmup_steps": ("scheduler.t_warmup", "ba"),
    "warmup_ratio": ("scheduler.t_warmup", "dur"),
    "eval_steps": ("eval_interval", "ba"),
    "save_steps": ("save_interval", "ba"),
    "logging_steps": ("console_log_interval", "ba"),
}
"""Key -> key here, and the unit of its number; of two for the same key, the first that is said."""
SCHEDULES = {"cosine": "cosine_with_warmup", "cosine_with_min_lr": "cosine_with_warmup"} | {
    "constant": "constant_with_warmup",
    "linear": "linear_decay_with_warmup",
}
NUMBERS = ("micro_batch_size", "gradient_accumulation_steps", "adam_beta1", "adam_beta2", "weight_decay", *UNITS)
NUMBERS += ("cosine_min_lr_ratio", "lora_r", "lora_alpha", "lora_dropout", "sequence_len")
DEFAULT = "the default of the Hugging Face trainer"


def is_axolotls(tree: dict[str, Any]) -> bool:
    """Tell a recipe of axolotl by ``base_model``."""
    return isinstance(tree.get("base_model"), str)


def migrate(path: Path, tree: dict[str, Any], world_size: int) -> Migration:
    """Turn a recipe of axolotl into one of this project.

    Args:
        path: The file.
        tree: Its keys and values.
        world_size: Number of ranks, by which the batch of a step is multiplied.
    """
    check_kinds(tree, NUMBERS)
    draft, name = Draft(tree), path.stem
    draft.put("run_name", name, why="the name of the file")
    _move_model(draft, name)
    _move_data(draft, name)
    _move_batch(draft, world_size)
    _move_units(draft)
    _move_optimizer(draft)
    _move_scheduler(draft)
    if draft.value("adapter") in ("lora", "qlora"):
        move_lora(draft, "lora_")
    else:
        draft.silence(*(key for key in draft.old if key.startswith("lora_")))
    _move_precision(draft)
    for key in [key for key in draft.old if draft.old[key] in (None, False, [], {})]:
        draft.silence(key)
    for key in [key for key in draft.old if key in draft.below(key)]:
        top = key.partition(".")[0]
        draft.drop(key, REASONS[top]) if top in REASONS else draft.move(key)
    return finish(draft, str(path), KIND)


def _move_model(draft: Draft, name: str) -> None:
    place = draft.old["base_model"]
    cfg, reason = read_model(place, {})
    if cfg is None:
        draft.drop("base_model", reason)
        draft.notes.append("the keys of model come from its config.json: name the directory as base_model")
    else:
        put_model(draft, cfg, "base_model")
        put_weights(draft, place, "base_model", name)
    draft.silence("base_model_config")


def _move_data(draft: Draft, name: str) -> None:
    length = draft.value("sequence_len")
    if length is not None:
        draft.put("max_seq_len", length, "sequence_len")
    draft.put("train_loader.dataset.local", f"data/{name}", why=DATA)
    if draft.value("sample_packing"):
        draft.put("model.document_masking", True, "sample_packing", "a token sees its own document alone")
    if not draft.value("val_set_size"):
        draft.put("eval_loader", None, why="nothing was held out")
    sets = draft.value("datasets") or draft.value("pretraining_dataset")
    responses = False
    for each in sets if isinstance(sets, list) else []:
        if isinstance(each, dict) and each.get("path"):
            kind = each.get("type", "completion")
            alone = kind != "completion" and not draft.value("train_on_inputs")
            responses, only = responses or alone, "; responses alone were targets" if alone else ""
            draft.notes.append(f"data: {each['path']} ({kind}) is to be prepared{only}")
    if responses:
        method = "best_fit" if draft.value("sample_packing") else "none"
        draft.put("train_loader.dataset.packing.method", method, why="prepared instructions are documents")
        how = f"RECORDS data/{name} --instructions --max-tokens {length or 'N'}"
    else:
        how = f"DOCUMENTS data/{name}"
    draft.notes.append(f"data: moefoundry prepare {how} --tokenizer DIR")


def _move_batch(draft: Draft, world_size: int) -> None:
    micro, steps = draft.value("micro_batch_size", 1), draft.value("gradient_accumulation_steps", 1)
    if "micro_batch_size" in draft.old:
        draft.put("device_train_microbatch_size", micro, "micro_batch_size")
    old = "gradient_accumulation_steps" if "gradient_accumulation_steps" in draft.old else ""
    why = f"micro_batch_size {micro} times {steps} steps times {world_size} ranks (--world-size)"
    draft.put("global_train_batch_size", micro * steps * world_size, old, why)
    if (value := draft.value("eval_batch_size")) is not None:
        draft.put("device_eval_batch_size", value, "eval_batch_size")


def _move_units(draft: Draft) -> None:
    for old, (new, unit) in UNITS.items():
        value = draft.value(old)
        if value is None or new in draft.new:
            continue
        if unit == "ba" and isinstance(value, float) and value < 1:
            value, unit = value, "dur"
        text = f"{int(value)}{unit}" if unit != "dur" and float(value).is_integer() else f"{value}{unit}"
        draft.put(new, text, old, "with its unit")
    for old, key in (("evals_per_epoch", "eval_interval"), ("saves_per_epoch", "save_interval")):
        value = draft.value(old)
        if value == 1:
            draft.put(key, "1ep", old)
        elif value is not None:
            draft.drop(old, f"{key} counts batches (ba), tokens (tok), sequences (sp) or epochs (ep)")
    if "max_duration" not in draft.new:
        draft.put("max_duration", "1ep", why="axolotl's default")


def _move_optimizer(draft: Draft) -> None:
    name = str(draft.value("optimizer", "adamw_torch_fused"))
    own = "adamw" if "adamw" in name else fitting_value("optimizer.name", name)
    why = "moments are fp32, or BF16 with precision.optimizer_moments" if "8bit" in name or "bnb" in name else ""
    draft.put("optimizer.name", own, "optimizer" if "optimizer" in draft.old else "", why)
    betas = [float(draft.value("adam_beta1", 0.9)), float(draft.value("adam_beta2", 0.999))]
    said = [key for key in ("adam_beta1", "adam_beta2") if draft.value(key) is not None]
    draft.put("optimizer.betas", betas, said[0] if said else "", "" if said else DEFAULT)
    draft.silence("adam_beta1", "adam_beta2")
    decay = "weight_decay" if draft.value("weight_decay") is not None else ""
    draft.put("optimizer.weight_decay", float(draft.value("weight_decay", 0.0)), decay, "" if decay else DEFAULT)
    if draft.value("max_grad_norm") == 0:
        draft.put("algorithms.gradient_clipping", None, "max_grad_norm")
    if draft.value("seed") is None:
        draft.put("seed", 42, why="axolotl's default")


def _move_scheduler(draft: Draft) -> None:
    name = str(draft.value("lr_scheduler", "cosine"))
    said = "lr_scheduler" if "lr_scheduler" in draft.old else ""
    own = SCHEDULES.get(name, name)
    draft.put("scheduler.name", own, said)
    if "scheduler.t_warmup" not in draft.new:
        draft.put("scheduler.t_warmup", "0ba", why="there was no warm-up")
    ratio = "cosine_min_lr_ratio" if draft.value("cosine_min_lr_ratio") is not None else ""
    if own == "cosine_with_warmup":
        draft.put("scheduler.alpha_f", float(draft.value("cosine_min_lr_ratio", 0.0)), ratio, "" if ratio else DEFAULT)


def _move_precision(draft: Draft) -> None:
    for key in ("bf16", "bfloat16", "fp16", "float16"):
        value = draft.value(key)
        if value in (True, "auto", "full") and "precision.compute" not in draft.new:
            why = "there is no fp16; bf16 needs no loss scaling" if "16" in key and key[0] == "f" else ""
            draft.put("precision.compute", "bf16", key, why)
        elif key in draft.old:
            draft.silence(key)
