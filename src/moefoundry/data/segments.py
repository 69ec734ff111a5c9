"""Shared memory of a dataset: its name, which no two runs of a machine share, and what shows that its run lives.

Used by :mod:`moefoundry.data.guard`, which says why.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import gettempdir

from streaming.base.constant import SHM_TO_CLEAN

from moefoundry.config.errors import DataError, UserError

MARKER = "moefoundry"  # follows the number that begins the names of a dataset's segments
SEGMENTS = Path("/dev/shm")
PATIENCE = 60.0
"""Seconds to wait for others that start; each takes well under one."""


class NodeFailure:
    """Flag of the library "a background thread has failed", shared by all processes of a node, with the reason.

    A file that is empty until something fails. It lies beside the dataset's segments of shared memory, under their
    number; while the process that created it lives, a lock on it says that the segments are in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)

    def __reduce__(self) -> tuple[type[NodeFailure], tuple[Path]]:
        return type(self), (self.path,)  # DataLoader workers that are not forked get it pickled

    @classmethod
    def create(cls, path: Path) -> NodeFailure:
        """Create the file; it is locked by the time that it can be seen. Removed when the process ends."""
        hidden = path.with_name(f".{path.name}")
        hidden.unlink(missing_ok=True)
        failure = cls(hidden)
        fcntl.flock(failure._file, fcntl.LOCK_EX)
        failure.path = hidden.rename(path)
        weakref.finalize(failure, _remove_in, os.getpid(), path)
        return failure

    def set(self, reason: str = "a shard could not be read") -> None:
        """Note a failure. One write is atomic, and the first counts."""
        self._file.write(f"{reason}\n".encode())

    def is_set(self) -> bool:
        """Tell if anything has failed in any process of the node."""
        return os.fstat(self._file.fileno()).st_size > 0

    def raise_if_set(self) -> None:
        """Do nothing unless something has failed.

        Raises:
            DataError: Gives the reason of the first failure.
        """
        if self.is_set():
            reasons = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
            raise DataError(reasons.decode().partition("\n")[0])


def _remove_in(process: int, path: Path) -> None:
    if os.getpid() == process:  # not in its forked workers
        path.unlink(missing_ok=True)


def segments_directory() -> Path:
    """Return the directory of shared memory; where there is none (macOS), only the flag is a file, a temporary one."""
    return SEGMENTS if SEGMENTS.is_dir() else Path(gettempdir())


@contextmanager
def sole_starter() -> Iterator[None]:
    """Let one process of the machine at a time, of any user, run the body.

    The lock is one of the directory itself, which every user may open; a file for it could belong to another. The body
    must not be collective: of two jobs that share two nodes, each could hold the lock that the other waits for.

    Raises:
        UserError: Another process holds the lock too long.
    """
    path = segments_directory()
    directory = os.open(path, os.O_RDONLY)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _try_lock(directory):
            if time.monotonic() > deadline:
                raise UserError(f"{path}: a process has locked it for {PATIENCE:.0f} seconds; `fuser {path}` names it")
            time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(directory, fcntl.LOCK_UN)  # closing alone would leave it to a process forked meanwhile
    finally:
        os.close(directory)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def free_number(first: int) -> int:
    """Find the first number that begins no name of a segment, of a flag or of the library's lock files."""
    directories = {segments_directory(), Path(gettempdir())}
    taken = {path.name.partition("_")[0] for directory in directories for path in directory.glob("[0-9]*_*")}
    return next(number for number in count(first) if f"{number:06}" not in taken)


def remove_stale_segments() -> None:
    """Remove the shared memory of dead runs of this program.

    A run's segments are told by the file of its :class:`NodeFailure`, whose lock the kernel drops when the process
    dies, however it dies. Segments without such a file are of other programs, or of another user, and stay.
    """
    for path in segments_directory().glob(f"[0-9]*_{MARKER}"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue  # replaced by another run's since it was opened
                for name in SHM_TO_CLEAN:
                    path.with_name(path.name.replace(MARKER, name)).unlink(missing_ok=True)
                path.unlink()
        except OSError:  # locked: its run lives; gone; or not ours to open
            continue
