"""Files and directories that get their name when they are complete.

Each is written under a hidden name beside its own, and renamed at the end. A process that is killed leaves the hidden
one behind; the next one that writes the same target removes it, or puts it back if it is what the dead one was
replacing.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moefoundry.config.errors import UserError

GIB = 2**30
IDLE_SECONDS = 24 * 3600.0
"""Seconds without a change after which files of another host, whose processes cannot be seen, are abandoned."""


@contextmanager
def staged(target: Path, nbytes: int = 0, replace: bool = False) -> Iterator[Path]:
    """Give a path to write to; it becomes ``target`` at the end, and is removed if an error is raised.

    Args:
        target: The file or directory to make.
        nbytes: Bytes that will be written at least; the disk must have them free.
        replace: Replace what is at ``target``. An empty directory is always replaced.

    Raises:
        UserError: ``target`` exists or has appeared meanwhile; or the disk is full, may not be written to, or fails.
    """
    process = f"{_host()}-{os.getpid()}"
    partial = target.parent / f".{target.name}.partial-{process}"
    retired = target.parent / f".{target.name}.replaced-{process}"
    try:
        if not replace and occupied(target):
            raise UserError(f"{target} exists already; nothing is overwritten")
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(target)
        _check_space(target.parent, nbytes)
        yield partial
        if not replace and occupied(target):
            raise UserError(f"{target}: another process has written it meanwhile; nothing was replaced")
        if target.exists():
            target.rename(retired)
        try:
            partial.rename(target)
        except OSError:
            if retired.exists():
                retired.rename(target)
            raise
        with suppress(OSError):
            _remove(retired)
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else str(target)
        raise UserError(f"{target}: cannot be written: {error.strerror or error} ({place})") from error
    finally:
        with suppress(OSError):  # where even that fails, the error that led here is the one to tell
            _remove(partial)


def occupied(target: Path) -> bool:
    """Tell if a file, or a directory that is not empty, is at a path."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _check_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise UserError(f"{directory}: {nbytes / GIB:.2f} GiB are needed, and {free / GIB:.2f} GiB are free there")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_abandoned(target: Path) -> None:
    """Remove what dead processes left beside ``target``; what one was replacing comes back if ``target`` is gone.

    Raises:
        UserError: It cannot be removed or put back.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|replaced)-(?:(.+)-)?(\d+)")
    try:
        beside = sorted(target.parent.iterdir())
    except OSError:
        return  # what is wrong with it is said when it is written to
    for place in beside:
        match = pattern.fullmatch(place.name)
        try:
            if match is None or not _abandoned(place, match[2], int(match[3])):
                continue
            if match[1] == "replaced" and not target.exists():
                place.rename(target)
            else:
                _remove(place)
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            raise UserError(f"{place}: left by a process that was killed, and in the way: {error.strerror}") from error


def _abandoned(place: Path, host: str | None, process: int) -> bool:
    if host in (None, _host()) and (process == os.getpid() or not _alive(process)):
        return True
    times = [entry.stat().st_mtime for entry in (place, *place.rglob("*"))]
    return time.time() - max(times) > IDLE_SECONDS


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())
