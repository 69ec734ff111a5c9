"""The place where a corpus is put together, block by block.

A name is a relative path, such as ``train/shard.00003.00000.mds``. A file gets its name when it is whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moefoundry.config.errors import UserError

LOCK_FILE = "lock"
UNLOCKABLE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # file systems without locks
SCRATCH = "scratch-"
PATIENCE = 10.0
"""Seconds to wait for a lock: processes of a run that was killed hold it until their next report."""


class LocalPlace:
    """A directory.

    Args:
        directory: Path of it; made when something is put there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[None]:
        """Keep other processes out of the place; with ``shared``, only those that do not share it.

        Raises:
            UserError: Another process is in it.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        deadline = time.monotonic() + PATIENCE
        while (file := self._try_lock(kind)) is None:
            if time.monotonic() > deadline:
                raise UserError(f"{self.directory}: another process is preparing this corpus")
            time.sleep(0.05)
        try:
            yield
        finally:
            os.close(file)

    def _try_lock(self, kind: int) -> int | None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / LOCK_FILE
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except (BlockingIOError, FileNotFoundError):
            pass  # held by another process, or removed by it meanwhile
        except OSError as error:
            if error.errno in UNLOCKABLE:
                return file
            raise
        os.close(file)
        return None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a new directory for files that :meth:`put` takes; it is removed at the end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.directory))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def put(self, file: Path, name: str) -> None:
        """Move a file of :meth:`scratch` to its name; what is there is replaced."""
        target = self.directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)

    def file(self, name: str) -> Path | None:
        """Return the path of a file; None if there is none of the name."""
        path = self.directory / name
        return path if path.is_file() else None

    def is_whole(self, name: str, size: int, sha1: str) -> bool:
        """Tell if a file is there with this content."""
        path = self.directory / name
        with suppress(OSError):
            if path.stat().st_size == size:
                with open(path, "rb") as stream:
                    return hashlib.file_digest(stream, "sha1").hexdigest() == sha1
        return False

    def names(self) -> list[str]:
        """List the files."""
        return sorted(str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if path.is_file())

    def remove_others(self, kept: set[str]) -> None:
        """Remove every file but those named, and the directories that become empty."""
        for name in self.names():
            if name not in kept:
                (self.directory / name).unlink()
        for path in sorted(self.directory.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
