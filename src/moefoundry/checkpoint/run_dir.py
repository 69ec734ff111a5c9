"""A run directory belongs to one recipe: nothing of another run is ever written over."""

from __future__ import annotations

import os
from pathlib import Path

from moefoundry.checkpoint.store import CheckpointStore
from moefoundry.config import Recipe, UserError, diff_recipes, dump_recipe, load_recipe

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


def store_of(run_dir: Path) -> CheckpointStore:
    """Where the checkpoints of a run are."""
    return CheckpointStore(run_dir / CHECKPOINTS)
