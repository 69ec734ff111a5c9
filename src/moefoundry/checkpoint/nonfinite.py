"""Steps of a run that were not finite: its directory has the state before each, as a checkpoint apart from its own."""

from __future__ import annotations

from pathlib import Path

from moefoundry.checkpoint.store import CheckpointStore
from moefoundry.config import UserError


def store_of_steps(run_dir: Path) -> CheckpointStore:
    """Give the directory of these checkpoints; it need not exist yet."""
    return CheckpointStore(run_dir / "nonfinite")


def newest_saved(run_dir: Path) -> tuple[CheckpointStore, int]:
    """Find the newest step that was saved: the checkpoints, and the batch before it.

    Raises:
        UserError: There is none.
    """
    store = store_of_steps(run_dir)
    if not (batches := store.batches()):
        raise UserError(f"{store.root}: no step that was not finite; a run that stops for one saves it there")
    return store, max(batches)
