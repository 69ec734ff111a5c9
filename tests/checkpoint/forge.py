"""Make the manifest of a checkpoint fit what its files have become, as no damaged disk can, but an attacker."""

from pathlib import Path

from moefoundry.checkpoint.manifest import (
    BLOCK_BYTES,
    COMMIT_FILE,
    MANIFEST_FILE,
    HashedBlock,
    Manifest,
    commit,
    digest,
)


def recommit(directory: Path) -> None:
    """Commit the files of ``directory`` as they are."""
    origin = Manifest.read(directory).origin
    files = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in (MANIFEST_FILE, COMMIT_FILE):
            content = path.read_bytes()
            starts = range(0, len(content), BLOCK_BYTES)
            parts = [content[start : start + BLOCK_BYTES] for start in starts]
            files[path.name] = [HashedBlock(s, len(p), digest(p)) for s, p in zip(starts, parts, strict=True)]
    commit(directory, origin, files)
