"""The checkpoints of a run, as directories ``ba{batch}`` under ``run_dir/checkpoints``.

    ba{batch}                   committed (``manifest.py``); never written to again
    ba{batch}.incomplete        being written or deleted, or left by a save or a deletion that did not end
    ba{batch}.quarantine-{k}    was damaged, and is kept for a person to look at

A checkpoint is written under its staging name, committed there and renamed, so nothing that a reader looks for is ever
half a checkpoint.
"""

from __future__ import annotations

import fcntl
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moefoundry.checkpoint.manifest import COMMIT_FILE, STATE_FILE, Manifest, is_committed, sync_directory
from moefoundry.config import UserError

CHECKPOINTS = "checkpoints"  # directory in run_dir
STAGING_SUFFIX = ".incomplete"
QUARANTINE_SUFFIX = ".quarantine-"
TOKENIZER = "tokenizer"  # directory, beside the tensors of an imported model
_NAME = re.compile(r"ba(\d+)")
_ANY_NAME = re.compile(rf"ba(\d+)({re.escape(QUARANTINE_SUFFIX)}\d+)?({re.escape(STAGING_SUFFIX)})?")


@dataclass(frozen=True)
class Retention:
    """Rules for checkpoints that stay; the newest always does, and so does one that is in use (:func:`using`).

    Attributes:
        newest: Number of the newest that stay; -1 is all.
        every: Batches; the first checkpoint of each such span stays. None keeps none for that.
        best: Name of a metric; the checkpoint where it was lowest stays. None keeps none for that.
    """

    newest: int = -1
    every: int | None = None
    best: str | None = None


@dataclass(frozen=True)
class CheckpointStore:
    """The directory that holds a run's checkpoints; it need not exist yet."""

    root: Path

    def path(self, batch: int) -> Path:
        """Give the directory of the checkpoint of this batch."""
        return self.root / f"ba{batch}"

    def staging_path(self, batch: int) -> Path:
        """Give the directory that it is written to until it is complete."""
        return self.root / f"ba{batch}{STAGING_SUFFIX}"

    def batches(self) -> list[int]:
        """List the batches that have a committed checkpoint, ascending."""
        return [batch for batch in self.claimed() if is_committed(self.path(batch))]

    def claimed(self) -> list[int]:
        """List the batches whose name is taken, by a committed checkpoint or by a damaged one, ascending."""
        if not self.root.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """Find the newest committed checkpoint."""
        batches = self.batches()
        return self.path(batches[-1]) if batches else None

    def begin(self, batch: int) -> Path:
        """Make an empty staging directory for ``batch``, and remove what was interrupted. One save at a time.

        Raises:
            UserError: The batch has a committed checkpoint already.
        """
        if self.path(batch).exists():
            if is_committed(self.path(batch)):
                raise UserError(f"{self.path(batch)} exists already; a published checkpoint is never overwritten")
            self.quarantine(batch)
        if self.root.is_dir():
            for left in self.root.glob(f"ba*{STAGING_SUFFIX}"):
                remove(left)
        staging = self.staging_path(batch)
        staging.mkdir(parents=True)
        return staging

    def publish(self, batch: int) -> Path:
        """Give a committed staging directory its final name.

        Raises:
            UserError: A checkpoint of that batch exists already.
            ValueError: The staging directory is not committed.
        """
        target, staging = self.path(batch), self.staging_path(batch)
        if not is_committed(staging):
            raise ValueError(f"{staging} is not committed")
        if target.exists():
            raise UserError(f"{target} exists already; a published checkpoint is never overwritten")
        staging.rename(target)
        sync_directory(self.root)
        return target

    def discard(self, batch: int) -> None:
        """Remove what a failed save has written."""
        shutil.rmtree(self.staging_path(batch), ignore_errors=True)

    def quarantine(self, batch: int) -> Path:
        """Rename a damaged checkpoint, so that training can save this batch again. Returns its new path."""
        path, number = self.path(batch), 0
        while (target := path.with_name(f"{path.name}{QUARANTINE_SUFFIX}{number}")).exists():
            number += 1
        return path.rename(target)

    def retain(self, retention: Retention) -> None:
        """Delete the checkpoints that need not stay."""
        batches = self.batches()
        if retention.newest < 0:
            return
        kept = set(batches[-max(retention.newest, 1) :])
        if retention.every is not None:
            spans = [batch // retention.every for batch in batches]
            kept |= {batch for batch, span, last in zip(batches, spans, [0, *spans], strict=False) if span > last}
        if retention.best is not None:
            measured = {batch: self._metric(batch, retention.best) for batch in batches}
            finite = [batch for batch, value in measured.items() if math.isfinite(value)]
            kept |= {min(finite, key=measured.__getitem__)} if finite else set()
        for batch in batches:
            if batch not in kept and not in_use(self.path(batch)):
                remove(self.path(batch))

    def _metric(self, batch: int, name: str) -> float:
        return Manifest.read(self.path(batch)).origin.metrics.get(name, math.nan)


def remove(directory: Path) -> None:
    """Delete a checkpoint, complete or not. Interrupted, it leaves none, and the next save removes what it leaves."""
    doomed = directory
    if not directory.name.endswith(STAGING_SUFFIX):
        doomed = directory.with_name(directory.name + STAGING_SUFFIX)
        if doomed.exists():
            remove(doomed)
        directory.rename(doomed)
    (doomed / COMMIT_FILE).unlink(missing_ok=True)
    while doomed.exists():
        with suppress(FileNotFoundError):  # another process may remove it, too
            shutil.rmtree(doomed)


@contextmanager
def using(checkpoint: Path) -> Iterator[None]:
    """Keep every run on this machine from deleting ``checkpoint`` meanwhile (where the file system has locks)."""
    with (checkpoint / COMMIT_FILE).open("rb") as marker:
        fcntl.flock(marker, fcntl.LOCK_SH)
        yield


def in_use(checkpoint: Path) -> bool:
    """Check whether a process is :func:`using` a checkpoint."""
    if not (checkpoint / COMMIT_FILE).is_file():
        return False
    with (checkpoint / COMMIT_FILE).open("rb") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def entries(root: Path) -> list[Path]:
    """List the directories in ``root`` that are checkpoints, damaged or unfinished ones too, by batch and name."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _ANY_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def find_checkpoint(path: str, key: str = "") -> Path:
    """Find a checkpoint that the user names by its directory, or the newest of a run's directory or ``checkpoints``.

    Args:
        path: The directory.
        key: Key of the recipe that names it, for the error; empty if it is an argument.

    Raises:
        UserError: There is none.
    """
    given = Path(path)
    if is_committed(given):
        return given
    for root in (given / CHECKPOINTS, given):
        latest = CheckpointStore(root).latest()
        if latest is not None:
            return latest
    if (given / STATE_FILE).is_file():
        Manifest.read(given)  # says what is wrong with it
    raise UserError(f"{key}: no complete checkpoint at {path}" if key else f"{path}: no complete checkpoint there")
