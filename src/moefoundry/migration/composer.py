"""Plain recipes in the words of Composer's ``Trainer``, and those of other trainers whose names the schema knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefoundry.migration.draft import Draft, check_kinds
from moefoundry.migration.finish import finish
from moefoundry.migration.loaders import LOADER
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

KIND = "Composer"
SECTIONS = {
    "optimizers": "optimizer",
    "schedulers": "scheduler",
    "train_dataloader": "train_loader",
    "eval_dataloader": "eval_loader",
}
"""Sections by Composer's names, and by those that LLM Foundry and this project have."""
PARTS = ("algorithms", "callbacks", "loggers")
REASONS = {
    "device": "training runs on the accelerator that there is",
    "python_log_level": "messages of this project are few, and errors one line",
    "deterministic_mode": "a run repeats itself on the same ranks",
    "load_strict_model_weights": "a checkpoint must have every weight of the model",
    "train_subset_num_batches": "an epoch is all of the data",
    "log_traces": "nothing of the kind is logged",
}


def is_composers(tree: dict[str, Any]) -> bool:
    """Tell a recipe in Composer's words by ``max_duration``; LLM Foundry's and this project's have it, too."""
    return "max_duration" in tree


def migrate(path: Path, tree: dict[str, Any]) -> Migration:
    """Turn a recipe in Composer's words into one of this project; arguments as of :func:`migrate_recipe`."""
    tree = {SECTIONS.get(name, name): value for name, value in tree.items()}
    for name in ("optimizer", "scheduler"):
        tree[name] = _named(tree.get(name))
    for name in PARTS:
        tree[name] = _by_name(tree.get(name))
    tree["fsdp_config"] = _sharding(tree)
    check_kinds(tree, ("optimizer.lr", "optimizer.weight_decay"), ("optimizer", "scheduler", "fsdp_config", *PARTS))
    draft = Draft(tree)
    draft.put("run_name", draft.value("run_name", path.stem), "run_name" if draft.value("run_name") else "", "")
    draft.silence("run_name", "variables", "model.name")
    if draft.value("optimizer.name"):
        move_optimizer(draft, str(draft.value("optimizer.name")), "optimizer")
    if draft.value("scheduler.name"):
        move_scheduler(draft, str(draft.value("scheduler.name")), "scheduler")
    move_evaluation(draft)
    move_precision(draft)
    move_sharding(draft, "fsdp_config")
    move_clipping(draft)
    for section in PARTS:
        move_parts(draft, section, CALLBACKS)
    for key in ("max_duration", "save_interval", "console_log_interval"):
        move_duration(draft, key)
    move_saving(draft)
    for section in ("train_loader", "eval_loader"):
        draft.move_rest(f"{section}.dataset", LOADER)
        draft.move_rest(section, LOADER)
    if draft.value("save_num_checkpoints_to_keep") is None:
        draft.put("save_num_checkpoints_to_keep", -1, why="Composer's default")
    for key in [key for key, value in draft.old.items() if value in (None, {}, [])]:
        draft.silence(key)
    draft.move_rest(reasons=REASONS)
    return finish(draft, str(path), KIND)


def _named(section: Any) -> Any:
    """Write ``{decoupled_adamw: {lr: 1}}``, also in a list, as ``{name: decoupled_adamw, lr: 1}``."""
    if isinstance(section, list) and section:
        section = section[0]
    if isinstance(section, str):
        return {"name": section}
    if isinstance(section, dict) and "name" not in section and len(section) == 1:
        name, keys = next(iter(section.items()))
        if keys is None or isinstance(keys, dict):  # else a key of the part, such as lr
            return {"name": name, **(keys or {})}
    return section


def _by_name(section: Any) -> Any:
    """Write a list of parts, ``[{speed_monitor: {}}, lr_monitor]``, as a mapping."""
    if not isinstance(section, list):
        return section
    found: dict[str, Any] = {}
    for each in section:
        found |= {each: {}} if isinstance(each, str) else each if isinstance(each, dict) else {}
    return found


def _sharding(tree: dict[str, Any]) -> Any:
    config = tree.pop("parallelism_config", None)
    return (config or {}).get("fsdp") if isinstance(config, dict) else tree.get("fsdp_config")
