"""The checkpoints of a run, as directories ``ba{batch}`` under ``run_dir/checkpoints``.

A checkpoint is written under a staging name and renamed when it is complete, so a directory of the final name is always
whole. Published checkpoints are never written to again.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from moefoundry.config import UserError

STAGING_SUFFIX = ".incomplete"
STATE_FILE = "state.json"
_NAME = re.compile(r"ba(\d+)")


@dataclass(frozen=True)
class CheckpointStore:
    """The directory that holds a run's checkpoints; it need not exist yet."""

    root: Path

    def path(self, batch: int) -> Path:
        """Where the checkpoint of this batch is, or will be."""
        return self.root / f"ba{batch}"

    def staging_path(self, batch: int) -> Path:
        """Where it is written until it is complete."""
        return self.root / f"ba{batch}{STAGING_SUFFIX}"

    def batches(self) -> list[int]:
        """Batches that have a complete checkpoint, ascending."""
        if not self.root.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.root.iterdir() if (path / STATE_FILE).is_file())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        batches = self.batches()
        return self.path(batches[-1]) if batches else None

    def begin(self, batch: int) -> Path:
        """An empty staging directory for ``batch``; what an interrupted save left there is removed."""
        staging = self.staging_path(batch)
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        return staging

    def publish(self, batch: int) -> Path:
        """Give a complete staging directory its final name.

        Raises:
            UserError: A checkpoint of that batch exists already.
        """
        target = self.path(batch)
        if target.exists():
            raise UserError(f"{target} exists already; a published checkpoint is never overwritten")
        return self.staging_path(batch).rename(target)

    def retain(self, count: int) -> None:
        """Delete all but the newest ``count``; -1 keeps all. The newest is always kept."""
        if count < 0:
            return
        for batch in self.batches()[: -max(count, 1)]:
            shutil.rmtree(self.path(batch))


def find_checkpoint(path: str) -> Path:
    """A checkpoint that the user names: its directory, or a run's directory, or its ``checkpoints`` (then the newest).

    Raises:
        UserError: There is none.
    """
    given = Path(path)
    if (given / STATE_FILE).is_file():
        return given
    for root in (given / "checkpoints", given):
        latest = CheckpointStore(root).latest()
        if latest is not None:
            return latest
    raise UserError(f"load_path: no complete checkpoint at {path}")
