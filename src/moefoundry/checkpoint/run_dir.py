"""A run directory belongs to one recipe: nothing of another run is ever written over."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.io import WEIGHTS_ONLY, read_state
from moefoundry.checkpoint.lease import make_directory
from moefoundry.checkpoint.manifest import visible_damage, write_synced
from moefoundry.checkpoint.ranks import from_every_rank, on_rank_zero, rank
from moefoundry.checkpoint.remote import find_remote, origin_of
from moefoundry.checkpoint.store import CheckpointStore, find_checkpoint
from moefoundry.config import Moments, Recipe, UserError, diff_recipes, dump_recipe, flatten, load_recipe
from moefoundry.config.build import changes_nothing
from moefoundry.config.spec import show_leaf
from moefoundry.config.urls import is_url, resolved

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
DOWNLOADS = "downloads"
Damage = Callable[[Path, int, int], list[str]]
MOMENTS = "precision.optimizer_moments"
FREE_KEYS = (
    "autoresume",
    "load_path",
    "allow_batch_size_change",
    "max_duration",
    "mesh.",
    "activation_checkpointing",
    "device_train_microbatch_size",
    "device_eval_batch_size",
    "eval_interval",
    "save_",
    "dist_timeout",
    "nonfinite",
    "progress_bar",
    "log_to_console",
    "console_log_interval",
    "callbacks.",
    "loggers.",
    "train_loader.num_workers",
    "eval_loader.num_workers",
    "train_loader.dataset.validate_hash",
    "eval_loader.dataset.validate_hash",
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
    """``run_dir``, and the checkpoint that the run continues, if any; every rank calls it. The directory is claimed
    later (:func:`claim_run_dir`), when all else has succeeded.

    Raises:
        UserError: As :func:`check_run_dir`, :func:`newest_without` and :func:`checkpoint_to_resume`.
    """
    run_dir = on_rank_zero(lambda: check_run_dir(recipe))
    newest = newest_without(visible_damage, store_of(run_dir)) if recipe.autoresume else None
    return run_dir, on_rank_zero(lambda: checkpoint_to_resume(recipe, newest))


def check_run_dir(recipe: Recipe) -> Path:
    """Make sure that ``run_dir`` is there and free for this run; one rank calls it.

    Raises:
        UserError: It, or its directory of checkpoints, cannot be written to; it belongs to a recipe that differs in
            more than :data:`FREE_KEYS`, or it holds checkpoints that this run would not continue (``autoresume`` is
            off).
    """
    run_dir = Path(recipe.run_dir)
    make_directory(run_dir)
    for directory in (run_dir, run_dir / CHECKPOINTS):
        writable = directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)
        if os.path.lexists(directory) and not writable:
            raise UserError(f"run_dir: {directory} is not a directory that can be written to")
    config = run_dir / CONFIG_FILE
    if config.exists():
        differences = [line for line in diff_recipes(load_recipe(config), recipe) if not line.startswith(FREE_KEYS)]
        batches = store_of(run_dir).batches()
        if differences:
            remedy = f"choose another run_{'name' if recipe.run_name in run_dir.parts else 'dir'}"
            remedy += "" if batches else f", or remove {run_dir}, which has no checkpoints"
            raise UserError(
                f"run_dir: {run_dir} belongs to a run with another recipe; {remedy}. Differing keys:\n  "
                + "\n  ".join(differences)
            )
        if batches and not recipe.autoresume:
            raise UserError(
                f"run_dir: {run_dir} holds checkpoints of this recipe; "
                "continue it with autoresume=true or choose another run_name"
            )
    return run_dir


def claim_run_dir(recipe: Recipe) -> None:
    """Write ``config.yaml``: from now on, ``run_dir`` belongs to this recipe.

    Done when all else has been checked, so that a corrected recipe may use the directory of a mistaken one.

    Raises:
        UserError: The file cannot be written; one that is there stays as it is.
    """
    path = Path(recipe.run_dir) / CONFIG_FILE
    fresh = path.with_name(f".{path.name}")
    try:
        write_synced(fresh, dump_recipe(recipe).encode())
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"run_dir: cannot write {path}: {error.strerror}") from error


def newest_without(damage: Damage, store: CheckpointStore) -> Path | None:
    """The newest checkpoint of a run that has no damage; every rank calls it and looks at a share of the files.

    Newer ones get a quarantine name, so that training can save those batches again, and a warning.

    Args:
        damage: :func:`manifest.visible_damage` before a checkpoint is loaded, which finds the rest; when that has
            failed, :func:`manifest.damage`.
        store: The run's.

    Raises:
        UserError: There are checkpoints, but all are damaged; they stay where they are.
    """
    damaged: dict[int, list[str]] = {}
    ranks = len(from_every_rank(rank()))
    for batch in reversed(on_rank_zero(store.claimed)):
        found = from_every_rank(damage(store.path(batch), rank(), ranks))
        problems = list(dict.fromkeys(line for lines in found for line in lines))
        if not problems:
            on_rank_zero(lambda: _quarantine(store, damaged))
            return store.path(batch)
        damaged[batch] = problems
    if damaged:
        raise UserError(_nothing_left(store, damaged))
    return None


def _nothing_left(store: CheckpointStore, damaged: Mapping[int, list[str]]) -> str:
    lines = [f"autoresume: every checkpoint in {store.root} is damaged:"]
    for first, *others in damaged.values():
        more = f" (and {len(others)} more; see moefoundry checkpoint verify)" if others else ""
        lines.append(first.replace(f"{store.root}/", "") + more)
    lines.append(
        f"bring back the files of one of them, or move {store.root} away: the run then goes on from save_remote, "
        "else starts from load_path, else anew"
    )
    return "\n  ".join(lines)


def _quarantine(store: CheckpointStore, damaged: Mapping[int, list[str]]) -> None:
    for batch, problems in damaged.items():
        moved = store.quarantine(batch)
        lines = [f"warning: {store.path(batch)} is damaged and now called {moved.name}:", *problems]
        print("\n  ".join(lines), file=sys.stderr, flush=True)


def checkpoint_to_resume(recipe: Recipe, newest: Path | None) -> Path | None:
    """The checkpoint to continue: the ``newest`` of the run if it has one, else that of ``save_remote`` (with
    ``autoresume``), else ``load_path``. Says so where its optimizer's moments have another dtype: loading converts.

    Raises:
        UserError: It is absent, unreadable, or of another architecture; or the run would go on within an epoch with
            another global batch size, by which the order of the data depends.
    """
    checkpoint = newest or _from_elsewhere(recipe)
    if checkpoint is None:
        return None
    document = read_state(checkpoint)
    saved, own = document["recipe"], flatten(recipe)
    if differing := _other_architecture(saved, own):
        raise UserError(f"{checkpoint} is a checkpoint of another architecture:\n  " + "\n  ".join(differing))
    sizes = saved.get("global_train_batch_size"), recipe.global_train_batch_size
    if sizes[0] != sizes[1] and not (recipe.allow_batch_size_change or document.get(WEIGHTS_ONLY)):
        raise UserError(
            f"global_train_batch_size: {sizes[1]}, and {checkpoint} was written with {sizes[0]}; the rest of its epoch "
            "would be other samples, some of them twice; allow_batch_size_change=true accepts that"
        )
    moments = saved.get(MOMENTS, Moments.fp32), own[MOMENTS]
    if (moments[0] == Moments.fp32) != (moments[1] == Moments.fp32) and not document.get(WEIGHTS_ONLY):
        text = f"note: {MOMENTS}: {moments[1]}; those of {checkpoint}, {moments[0]}, are converted"
        print(text, file=sys.stderr, flush=True)
    return checkpoint


def _other_architecture(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """A line for each key of the architecture that differs between two flat recipes. What a recipe does not have is off
    in it: it was stored before there was such a key, or belongs to a mapping that is null."""
    lines = []
    for key in dict.fromkeys((*own, *saved)):
        if key.startswith("model.") and not key.startswith(NOT_ARCHITECTURE):
            there, here = saved.get(key), own.get(key)
            if there != here and not (changes_nothing(there) and changes_nothing(here)):
                lines.append(f"{key}: {show_leaf(there)} there, {show_leaf(here)} here")
    return lines


def _from_elsewhere(recipe: Recipe) -> Path | None:
    cache = Path(recipe.run_dir) / DOWNLOADS
    if recipe.autoresume and recipe.save_remote and (uploaded := find_remote(recipe.save_remote, cache)):
        return uploaded
    if recipe.load_path is None:
        return None
    if not is_url(path := resolved(recipe.load_path)):
        return find_checkpoint(path)
    downloaded = find_remote(recipe.load_path, cache)
    if downloaded is None:
        raise UserError(f"load_path: no complete checkpoint at {recipe.load_path}")
    return downloaded


def continues_itself(recipe: Recipe, checkpoint: Path | None) -> bool:
    """Whether ``checkpoint`` was saved by this run, here or to ``save_remote``, and what is in ``run_dir`` goes on."""
    if checkpoint is None:
        return False
    if checkpoint.parent == store_of(Path(recipe.run_dir)).root:
        return True
    origin, uploads = origin_of(checkpoint), recipe.save_remote
    return recipe.autoresume and bool(origin and uploads and origin.startswith(f"{uploads.rstrip('/')}/"))


def store_of(run_dir: Path) -> CheckpointStore:
    """Where the checkpoints of a run are."""
    return CheckpointStore(run_dir / CHECKPOINTS)
