"""Verify a whole checkpoint, or make its manifest fit changed files, as no damaged disk can, but an attacker."""

from pathlib import Path

from moefoundry.checkpoint.manifest import (
    COMMIT_FILE,
    MANIFEST_FILE,
    RANGE_BYTES,
    HashRange,
    Manifest,
    commit,
    damage,
    digest,
)
from moefoundry.config import UserError


def verify_directory(directory: Path) -> Manifest:
    """Read every byte and raise what is wrong; the manifest."""
    if problems := damage(directory):
        raise UserError("\n".join(problems))
    return Manifest.read(directory)


def recommit(directory: Path) -> None:
    """Commit the files of ``directory`` as they are."""
    origin = Manifest.read(directory).origin
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in (MANIFEST_FILE, COMMIT_FILE):
            content = path.read_bytes()
            starts = range(0, len(content), RANGE_BYTES)
            parts = [content[start : start + RANGE_BYTES] for start in starts]
            files[path.name] = [HashRange(s, len(p), digest(p)) for s, p in zip(starts, parts, strict=True)]
    commit(directory, origin, files)
