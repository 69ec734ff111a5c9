"""Parts that LLM Foundry and Composer share: durations, optimizer, schedule, precision, sharding, monitors."""

from __future__ import annotations

from collections.abc import Mapping

from moefoundry.config.parts import TABLES
from moefoundry.config.spec import every_key
from moefoundry.llm_foundry.fit import NO_FSDP1
from moefoundry.migration.draft import Draft
from moefoundry.migration.names import fitting_value

EPOCHS = "a number alone means epochs"
NO_PART = "no part of this name is installed; docs/extending.md shows how a package adds one"
CALLBACKS = {
    "hf_checkpointer": "`moefoundry convert export RUN -o DIR` writes a Hugging Face directory from any checkpoint",
    "hf_checkpointer_multi": "`moefoundry convert export RUN -o DIR` writes a Hugging Face directory",
    "mono_checkpoint_saver": "checkpoints here are read on any number of ranks; `convert consolidate` makes one file",
    "generate_callback": "callbacks.report.prompt is continued at the end of a run; `moefoundry generate` does at once",
    "eval_output_logging": "evaluations are in run_dir/metrics.jsonl",
    "global_lr_scaling": "set optimizer.lr, or an override",
    "layer_freezing": "all weights train; LoRA trains few",
    "loss_perp_v_len": "metrics.jsonl has the loss of all positions together",
    "scheduled_gc": "Python's garbage collector is left alone",
    "checkpoint_saver": "checkpoints are saved by save_interval",
}
FSDP = {
    "mixed_precision": "master weights and their gradients are fp32, products as precision.compute says",
    "limit_all_gathers": NO_FSDP1,
    "backward_prefetch": NO_FSDP1,
    "forward_prefetch": NO_FSDP1,
    "sync_module_states": NO_FSDP1,
    "use_orig_params": NO_FSDP1,
    "flatten_parameters": NO_FSDP1,
    "keep_low_precision_grads": "gradients are reduced in fp32",
    "activation_checkpointing_reentrant": "checkpointing is without reentrance",
    "state_dict_type": "a checkpoint has a shard of each rank, and is read on any number of ranks",
    "load_monolith_rank0_only": "every rank reads its own part",
    "load_planner": "every rank reads its own part",
    "save_planner": "every rank writes its own part",
    "activation_cpu_offload": "activations stay on the device; activation_checkpointing saves more",
    "cpu_offload": "parameters stay on the device",
    "auto_wrap": "each block is a unit of its own",
    "verbose": "`moefoundry plan` tells what each rank holds",
}

WHOLE = "parameters stay whole from the first forward to the last backward pass of a step"


def move_duration(draft: Draft, old: str, new: str = "", why: str = "") -> None:
    """Move a duration; an integer is a number of epochs."""
    value = draft.value(old)
    if value is None:
        draft.silence(old)
    elif isinstance(value, bool) or not isinstance(value, int):
        draft.put(new or old, value, old, why)
    else:
        draft.put(new or old, f"{value}ep", old, why or EPOCHS)


def move_evaluation(draft: Draft) -> None:
    """Move ``eval_interval``; 0 never evaluates, and absent is an epoch."""
    value = draft.value("eval_interval")
    if value in (0, "0ba", "0ep"):
        draft.put("eval_loader", None, "eval_interval", "nothing is evaluated")
        for path in draft.below("eval_loader"):
            draft.drop(path, "nothing is evaluated")
    elif value is None:
        draft.put("eval_interval", "1ep", why="Composer's default is an epoch")
    else:
        move_duration(draft, "eval_interval")
    if draft.value("eval_first"):
        draft.move("eval_first")
    draft.silence("eval_first")
    if draft.value("eval_subset_num_batches", -1) == -1:
        draft.silence("eval_subset_num_batches")


def move_optimizer(draft: Draft, name: str, section: str) -> None:
    """Move an optimizer.

    Args:
        draft: The recipe.
        name: The optimizer's name there.
        section: Where its keys stand.
    """
    own, known = fitting_value("optimizer.name", name), TABLES["optimizers"].names()
    old = f"{section}.name" if f"{section}.name" in draft.old else section
    if own in known:
        why = "the same steps" if own != name else ""
        draft.put("optimizer.name", own, old, why)
    else:
        own = "adamw"
        draft.put("optimizer.name", own, old, f"{name} is no optimizer here, so choose optimizer.lr anew")
        draft.notes.append(f"optimizer.lr was chosen for {name}; Lion's rates are a third to a tenth of AdamW's")
    if own == "adamw":
        _move_decay(draft, name, section)
    draft.move_rest(section)


def _move_decay(draft: Draft, name: str, section: str) -> None:
    """Move the weight decay. Composer's decoupled optimizers do not multiply it by the peak rate."""
    lr, old = draft.value(f"{section}.lr"), f"{section}.weight_decay"
    decoupled = name.startswith("decoupled")
    value = draft.value(old)
    if isinstance(value, str) or (decoupled and not (isinstance(lr, (int, float)) and lr)):
        return
    said, value = (old if value is not None else ""), value if value is not None else 1e-5 if decoupled else 1e-2
    betas = f"{section}.betas"
    if not decoupled and draft.value(betas) is None and name.lower().startswith("adam"):
        draft.put("optimizer.betas", [0.9, 0.999], why=f"the default of {name}")
    if not decoupled or not value:
        draft.put("optimizer.weight_decay", float(value), said, "" if said else f"the default of {name}")
        return
    why = f"divided by the peak rate: {name} does not multiply by it; norms, biases and embeddings do not decay"
    draft.put("optimizer.weight_decay", float(f"{value / lr:.6g}"), said, why)


def move_scheduler(draft: Draft, name: str, section: str) -> None:
    """Move a schedule; arguments as of :func:`move_optimizer`."""
    own, known = fitting_value("scheduler.name", name), TABLES["schedulers"].names()
    old = f"{section}.name" if f"{section}.name" in draft.old else section
    if own in known:
        draft.put("scheduler.name", own, old)
    else:
        own = "constant_with_warmup"
        draft.put("scheduler.name", own, old, f"{name} is no schedule here: choose one")
    draft.put("scheduler.timing", "composer", why="a batch is where Composer has it in the schedule")
    final = draft.value(f"{section}.alpha_f")
    if own == "cosine_with_warmup" and final is None:
        draft.put("scheduler.alpha_f", 0.0, why="Composer's default")
    if own.endswith("with_warmup"):
        _move_warmup(draft, section)
    for path in draft.below(section):
        value = draft.old[path]
        draft.move(path, new=f"scheduler.{path.removeprefix(section + '.')}" if value is not None else "")


def _move_warmup(draft: Draft, section: str) -> None:
    move_duration(draft, f"{section}.t_warmup", "scheduler.t_warmup")
    if "scheduler.t_warmup" not in draft.new:
        draft.put("scheduler.t_warmup", "0ba", why="there was no warm-up")
    reasons = {"t_max": ("1dur", "a schedule lasts as long as the run"), "scale_warmup": (False, "warm-up is as said")}
    reasons["alpha_i"] = (1.0, "a decay begins at the peak rate")
    for name, (default, why) in reasons.items():
        if (path := f"{section}.{name}") in draft.old:
            draft.silence(path) if draft.value(path, default) == default else draft.drop(path, why)


def move_precision(draft: Draft, default: str = "") -> None:
    """Move ``precision``; ``default`` is LLM Foundry's."""
    value = draft.value("precision")
    if value is None:
        draft.silence("precision")
        if default:
            why = f"LLM Foundry's default is {default}"
            draft.put("precision.compute", fitting_value("precision.compute", default), why=why)
    elif isinstance(value, str) and "fp16" in value:
        draft.put("precision.compute", "bf16", "precision", "there is no fp16; bf16 needs no loss scaling")
    elif isinstance(value, str) and "fp8" in value:
        draft.put("precision.compute", "bf16", "precision", "precision.fp8.recipe chooses FP8: docs/fp8.md")
    else:
        draft.put("precision.compute", fitting_value("precision.compute", value), "precision")


def move_sharding(draft: Draft, section: str) -> None:
    """Move ``fsdp_config``: to ``mesh`` and ``activation_checkpointing``."""
    if section in draft.old:  # null or empty
        draft.silence(section)
        return
    if (old := f"{section}.activation_checkpointing") in draft.old:
        value = draft.value(old, False)
        draft.put("activation_checkpointing", fitting_value("activation_checkpointing", value), old)
    old = f"{section}.sharding_strategy"
    strategy = None if draft.value(old) is None else str(draft.value(old))
    if strategy == "NO_SHARD":
        draft.put("mesh.shard", 1, old, "each rank holds the whole model")
        draft.put("mesh.replicate", -1, why="mesh.shard is 1")
    elif strategy is not None and "HYBRID" in strategy:
        draft.drop(old, "mesh.shard is the number of ranks that share a copy, mesh.replicate the number of copies")
        draft.to_fill_in["mesh.shard"] = "ranks that share one copy of the model, such as those of a node"
    elif strategy == "SHARD_GRAD_OP":
        draft.put("mesh.gather", "each_step", old, WHOLE)
    elif strategy is not None:
        why = "mesh.shard -1, the default, shards parameters, gradients and moments over all ranks"
        draft.same("mesh.shard", old, why) if strategy == "FULL_SHARD" else draft.drop(old, why)
    if (old := f"{section}.reshard_after_forward") in draft.old:
        if draft.value(old) is False:
            draft.put("mesh.gather", "each_step", old, WHOLE)
        else:
            draft.same("mesh.gather", old, "parameters are gathered again for the backward pass")
    for path in draft.below(section):
        draft.move(path, FSDP)


def move_parts(draft: Draft, section: str, reasons: Mapping[str, str]) -> None:
    """Move the mapping of callbacks, loggers or algorithms: parts that are known here, with the keys that they have.

    Args:
        draft: The recipe.
        section: Name of the mapping, there and here.
        reasons: Name of a part -> the reason why it has no equal.
    """
    names = dict.fromkeys(path.split(".")[1] for path in draft.below(section) if "." in path)
    known = {*TABLES[section].names(), *(key.split(".")[1] for key in every_key() if key.startswith(f"{section}."))}
    for name in names:
        path = f"{section}.{name}"
        if name in reasons or name not in known:
            draft.drop(path, reasons.get(name, NO_PART))
        elif path in draft.old:  # no keys
            draft.put(path, {}, path) if draft.old[path] == {} else draft.put(path, {}, path, "null turns a part off")
        else:
            draft.move_rest(path)
            if not any(key.startswith(f"{path}.") for key in draft.new):
                draft.put(path, {}, why=f"{name} was on")
    draft.silence(section)


def move_clipping(draft: Draft) -> None:
    """Say that nothing is clipped where the old recipe does not clip."""
    if not any(path.startswith("algorithms.gradient_clipping") for path in draft.old):
        draft.put("algorithms.gradient_clipping", None, why="nothing was clipped")


def move_saving(draft: Draft) -> None:
    """Move where checkpoints go and come from."""
    folder, load = draft.value("save_folder"), draft.value("load_path")
    if folder is not None and "://" in str(folder):
        draft.put("save_remote", str(folder), "save_folder", "a run also keeps them in run_dir/checkpoints")
    elif folder is None and "save_interval" not in draft.old:
        draft.notes.append("checkpoints are saved to run_dir/checkpoints, which there needs save_folder")
    if load is not None and "load_path" not in draft.new:
        why = (
            "import it first: moefoundry convert import CHECKPOINT -o DIR; then load_path: DIR, load_weights_only: true"
        )
        draft.drop("load_path", why)
        draft.silence("load_weights_only")
