"""A run directory belongs to one recipe: nothing of another run is ever written over."""

from __future__ import annotations

import os
from pathlib import Path

from moefoundry.checkpoint.io import read_state
from moefoundry.checkpoint.store import CheckpointStore, find_checkpoint
from moefoundry.config import Recipe, UserError, diff_recipes, dump_recipe, flatten, load_recipe

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
FREE_KEYS = (
    "autoresume",
    "load_path",
    "max_duration",
    "mesh.",
    "activation_checkpointing",
    "device_train_microbatch_size",
    "device_eval_batch_size",
    "eval_interval",
    "save_",
    "dist_timeout",
    "progress_bar",
    "log_to_console",
    "console_log_interval",
    "callbacks.",
    "loggers.",
    "train_loader.num_workers",
    "eval_loader.num_workers",
)
"""Keys, or prefixes of keys, that a resumed run may change."""


NOT_ARCHITECTURE = (
    "model.init.",
    "model.document_masking",
    "model.moe.router.input_jitter",
    "model.moe.balance.",
    "model.moe.capacity_factor",
    "model.moe.backend",
    "model.mtp.loss_weight",
)
"""Keys of ``model`` that a run may change when it starts from another's checkpoint."""


def open_run(recipe: Recipe) -> tuple[Path, Path | None]:
    """Claim ``run_dir`` and find the checkpoint that the run continues, if any; one rank calls it.

    Raises:
        UserError: As :func:`check_run_dir` and :func:`checkpoint_to_resume`; nothing has been written then.
    """
    run_dir = check_run_dir(recipe)
    checkpoint = checkpoint_to_resume(recipe, run_dir)
    claim_run_dir(recipe)
    return run_dir, checkpoint


def check_run_dir(recipe: Recipe) -> Path:
    """Make sure that ``run_dir`` is there and free for this run; one rank calls it.

    Raises:
        UserError: It cannot be written, it belongs to a recipe that differs in more than :data:`FREE_KEYS`, or it holds
            checkpoints that this run would not continue (``autoresume`` is off).
    """
    run_dir = Path(recipe.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir: cannot create {run_dir}: {error.strerror}") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {run_dir} is not writable")
    config = run_dir / CONFIG_FILE
    if config.exists():
        differences = [line for line in diff_recipes(load_recipe(config), recipe) if not line.startswith(FREE_KEYS)]
        if differences:
            raise UserError(
                f"run_dir: {run_dir} belongs to a run with another recipe; choose another run_name. Differing keys:\n  "
                + "\n  ".join(differences)
            )
        if store_of(run_dir).batches() and not recipe.autoresume:
            raise UserError(
                f"run_dir: {run_dir} holds checkpoints of this recipe; "
                "continue it with autoresume=true or choose another run_name"
            )
    return run_dir


def claim_run_dir(recipe: Recipe) -> None:
    """Write ``config.yaml``: from now on, ``run_dir`` belongs to this recipe.

    Done when all else has been checked, so that a corrected recipe may use the directory of a mistaken one.
    """
    (Path(recipe.run_dir) / CONFIG_FILE).write_text(dump_recipe(recipe))


def checkpoint_to_resume(recipe: Recipe, run_dir: Path) -> Path | None:
    """The checkpoint to continue: with ``autoresume`` the newest of the run, else ``load_path``.

    Raises:
        UserError: It is absent, unreadable, or of another architecture.
    """
    latest = store_of(run_dir).latest() if recipe.autoresume else None
    checkpoint = latest or (recipe.load_path and find_checkpoint(recipe.load_path))
    if not checkpoint:
        return None
    saved, own = read_state(checkpoint)["recipe"], flatten(recipe)
    differing = [
        f"{key}: {saved.get(key)!r} there, {value!r} here"
        for key, value in own.items()
        if key.startswith("model.") and not key.startswith(NOT_ARCHITECTURE) and saved.get(key) != value
    ]
    if differing:
        raise UserError(f"{checkpoint} is a checkpoint of another architecture:\n  " + "\n  ".join(differing))
    return checkpoint


def store_of(run_dir: Path) -> CheckpointStore:
    """Where the checkpoints of a run are."""
    return CheckpointStore(run_dir / CHECKPOINTS)
