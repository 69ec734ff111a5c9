"""A directory appears when it is complete.

It is written into a hidden sibling, which is renamed at the end. A process that is killed leaves its sibling behind;
the next one that writes the same directory removes it, or puts it back if it holds what the dead one was replacing.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moefoundry.config.errors import UserError

IDLE_SECONDS = 24 * 3600.0
"""A sibling of another host, whose processes cannot be seen, is abandoned when nothing in it changes for so long."""


@contextmanager
def staging(out: Path, replace: bool) -> Iterator[Path]:
    """A hidden sibling of ``out`` that takes its place when the body succeeds, and is gone when it does not.

    Args:
        out: An absolute path.
        replace: Whether what lies there may be replaced; an empty directory always is.

    Raises:
        UserError: It cannot be written, or something has appeared at ``out`` meanwhile.
    """
    process = f"{_host()}-{os.getpid()}"
    partial = out.parent / f".{out.name}.partial-{process}"
    retired = out.parent / f".{out.name}.replaced-{process}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if not replace and out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out}: another process has written it meanwhile; nothing was replaced")
        if out.exists():
            out.rename(retired)
        try:
            partial.rename(out)
        except OSError:
            if retired.exists():
                retired.rename(out)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else str(out)
        raise UserError(f"{out}: cannot be written: {error.strerror or error} ({place})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear_abandoned(out: Path) -> None:
    """Remove what dead processes left beside ``out``; a directory that one was replacing comes back if ``out`` is gone.

    Raises:
        UserError: It cannot be removed or put back.
    """
    pattern = re.compile(re.escape(f".{out.name}.") + r"(partial|replaced)-(?:(.+)-)?(\d+)")
    try:
        beside = sorted(out.parent.iterdir())
    except OSError:
        return  # what is wrong with it is said when it is written to
    for place in beside:
        match = pattern.fullmatch(place.name)
        try:
            if match is None or not _abandoned(place, match[2], int(match[3])):
                continue
            if match[1] == "replaced" and not out.exists():
                place.rename(out)
            else:
                shutil.rmtree(place)
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
