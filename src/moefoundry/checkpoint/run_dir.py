"""Open and claim a run directory, which belongs to one recipe: nothing of another run is ever written over."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moefoundry.checkpoint.base import find_base
from moefoundry.checkpoint.lease import make_directory
from moefoundry.checkpoint.manifest import Manifest, damage, read_state, write_synced
from moefoundry.checkpoint.ranks import from_every_rank, on_rank_zero, rank
from moefoundry.checkpoint.remote import find_remote, is_downloaded
from moefoundry.checkpoint.start import Start, check_architecture, check_start
from moefoundry.checkpoint.store import CHECKPOINTS, CheckpointStore, find_checkpoint
from moefoundry.config import Recipe, UserError, diff_recipes, dump_recipe, flatten, load_recipe
from moefoundry.config.secrets import redact
from moefoundry.config.spec import is_free_on_resume, show_leaf
from moefoundry.config.urls import is_url, resolved
from moefoundry.config.versions import without_effect

CONFIG_FILE = "config.yaml"
DOWNLOADS = "downloads"


def open_run(recipe: Recipe, digests: Mapping[str, str]) -> tuple[Path, Start | None]:
    """Find what the run starts from, if anything; every rank calls it.

    The directory is claimed later (:func:`claim_run_dir`), when all else has succeeded. ``digests`` are those of the
    run's data (:func:`moefoundry.checkpoint.start.data_digests`).

    Raises:
        UserError: As :func:`check_run_dir`, :func:`newest_intact` and :func:`check_start`; or there is no checkpoint
            where ``load_path`` says.
    """
    run_dir = on_rank_zero(lambda: check_run_dir(recipe))
    newest = newest_intact(store_of(run_dir), sizes_only=True) if recipe.autoresume else None
    return run_dir, on_rank_zero(lambda: _start(recipe, newest, digests))


def check_run_name(recipe: Recipe) -> None:
    """Make sure that ``run_dir`` was not left behind by a change of ``run_name``, as in a run's own ``config.yaml``.

    Call it where ``run_dir`` was not itself chosen with the new name.

    Raises:
        UserError: A run of another name, after which the directory is called, has it.
    """
    run_dir = Path(recipe.run_dir)
    config = run_dir / CONFIG_FILE
    if recipe.run_name in run_dir.parts or not config.exists():
        return
    name = load_recipe(config, stored=True).run_name
    if name in run_dir.parts:
        own = Path(*(recipe.run_name if part == name else part for part in run_dir.parts))
        raise UserError(
            f"run_name: {recipe.run_name}, and {run_dir} is the run {name}; give this one a directory of its own: "
            f"run_dir={own}; or say that it is to go on there: run_dir={run_dir}"
        )


def check_run_dir(recipe: Recipe) -> Path:
    """Make sure that ``run_dir`` is there and free for this run; one rank calls it.

    Raises:
        UserError: It, or its directory of checkpoints, cannot be written to; it belongs to a recipe that differs in
            more than a resumed run may change, or it holds checkpoints that this run would not continue
            (``autoresume`` is off).
    """
    run_dir = Path(recipe.run_dir)
    make_directory(run_dir)
    for directory in (run_dir, run_dir / CHECKPOINTS):
        writable = directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)
        if os.path.lexists(directory) and not writable:
            raise UserError(f"run_dir: {directory} is not a directory that can be written to")
    config = run_dir / CONFIG_FILE
    if config.exists():
        stored = load_recipe(config, stored=True)
        unread = set(without_effect(flatten(stored))) & set(without_effect(flatten(recipe)))
        changed = {line.partition(":")[0]: line for line in diff_recipes(stored, recipe)}
        differences = [
            line for key, line in changed.items() if not is_free_on_resume(key) and not key.startswith(tuple(unread))
        ]
        batches = store_of(run_dir).batches()
        remedy = f"choose another run_{'name' if recipe.run_name in run_dir.parts else 'dir'}"
        if differences:
            remedy += "" if batches else f", or remove {run_dir}, which has no checkpoints"
            raise UserError(
                f"run_dir: {run_dir} belongs to a run with another recipe; {remedy}. Differing keys:\n  "
                + "\n  ".join(differences)
            )
        if batches and not recipe.autoresume:
            raise UserError(
                f"run_dir: {run_dir} holds checkpoints of this recipe; continue it with autoresume=true or {remedy}"
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


def newest_intact(store: CheckpointStore, sizes_only: bool) -> Path | None:
    """Find the newest checkpoint of a run without damage; every rank calls it and looks at a share of the files.

    Newer ones get a warning and a quarantine name, so that training can save those batches again. ``sizes_only`` is
    enough before a checkpoint is loaded, which finds further damage; when that has failed, files are read.

    Raises:
        UserError: There are checkpoints, but all are damaged; they stay where they are.
    """
    damaged: dict[int, list[str]] = {}
    ranks = len(from_every_rank(rank()))
    for batch in reversed(on_rank_zero(store.claimed)):
        found = from_every_rank(damage(store.path(batch), rank(), ranks, sizes_only))
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
        _say("\n  ".join(lines))


def _start(recipe: Recipe, newest: Path | None, digests: Mapping[str, str]) -> Start | None:
    """Choose and check the checkpoint to start from; a refused download is removed.

    With ``autoresume`` the newer of the run's ``newest`` and that of ``save_remote``, else ``load_path``; None to begin
    anew.
    """
    checkpoint, own, cache = newest, True, Path(recipe.run_dir) / DOWNLOADS
    if recipe.autoresume and recipe.save_remote:
        checkpoint = _uploaded(recipe.save_remote, newest, cache) or newest
    if checkpoint is not None and recipe.load_path is not None:
        _say(f"note: load_path is not read: the run goes on from {checkpoint}, its own")
    elif recipe.load_path is not None:
        own, path = False, resolved(recipe.load_path)
        checkpoint = find_remote(recipe.load_path, cache) if is_url(path) else find_checkpoint(path, "load_path")
        if checkpoint is None:
            raise UserError(f"load_path: no complete checkpoint at {recipe.load_path}")
    if checkpoint is None and recipe.lora is None:
        return None
    try:
        if checkpoint is None:
            return _with_base(Start(Path(), own=False, weights_only=True), recipe, None, cache)
        if own and checkpoint != newest:
            _check_uploaded(recipe, checkpoint)
        start = check_start(checkpoint, own, recipe, digests)
        return start if recipe.lora is None else _with_base(start, recipe, checkpoint, cache)
    except UserError:
        if checkpoint is not None and is_downloaded(checkpoint):
            shutil.rmtree(checkpoint)
        raise


def _uploaded(save_remote: str, newest: Path | None, cache: Path) -> Path | None:
    """Find the newest uploaded checkpoint, if it is newer than the run's ``newest``, and say so.

    Raises:
        UserError: As :func:`find_remote`, where there is no ``newest`` to go on from.
    """
    if newest is None:
        return find_remote(save_remote, cache)
    try:
        found = find_remote(save_remote, cache, after=Manifest.read(newest).origin.batch)
    except UserError as error:
        _say(f"warning: save_remote: whether it has a newer checkpoint than {newest} is not known: {error}")
        return None
    if found is not None:
        place = f"save_remote, {redact(save_remote)},"
        remedy = f"to go on from {newest.name} instead, name another save_remote, or move the newer ones there away"
        _say(f"note: {place} has {found.name}, newer than {newest}: the run goes on from it; {remedy}")
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _with_base(start: Start, recipe: Recipe, checkpoint: Path | None, cache: Path) -> Start:
    """Add the base of the run's adapters to how it begins; without a ``checkpoint``, it begins with the base."""
    base = find_base(recipe, checkpoint, cache / "base")
    check_architecture(base.checkpoint, read_state(base.checkpoint)["recipe"], flatten(recipe))
    return replace(start, base=base, checkpoint=base.checkpoint if checkpoint is None else checkpoint)


def _check_uploaded(recipe: Recipe, uploaded: Path) -> None:
    """Check that a checkpoint in the store is the run's own: a copied recipe may name the store of another run."""
    saved, own = read_state(uploaded)["recipe"], flatten(recipe)
    differing = [
        f"{key}: {show_leaf(saved[key])} -> {show_leaf(own[key])}"
        for key in own
        if key in saved and saved[key] != own[key] and not is_free_on_resume(key)
    ]
    if differing:
        raise UserError(
            f"save_remote: {recipe.save_remote} holds checkpoints of a run with another recipe; choose another URL. "
            "Differing keys:\n  " + "\n  ".join(differing)
        )


def store_of(run_dir: Path) -> CheckpointStore:
    """Give the checkpoints of a run."""
    return CheckpointStore(run_dir / CHECKPOINTS)
