"""Search for the files of a corpus.

Directories are walked in full, links are followed, and a file or directory that is reached more than once is read once:
by its own name if that lies in the corpus, else by the first link. Hidden files and directories are left out. What
cannot be read is reported.
"""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from moefoundry.config.errors import UserError
from moefoundry.data.left_out import Reason

Report = Callable[[str, Reason, int | None], None]
"""Callback for what is left out: its name, the reason, and its bytes (None: unknown)."""


class Entry(NamedTuple):
    """Entry of a directory that is no directory itself.

    Attributes:
        path: POSIX path relative to the corpus.
        status: Status of the file, behind links; None if a link leads to nothing, or it may not be read.
        linked: True if it is a link, or lies behind one.
    """

    path: str
    status: os.stat_result | None
    linked: bool


def walk(root: Path, leave: Path | None, report: Report, patterns: Sequence[str] = ("**",)) -> list[Entry]:
    """List everything below ``root`` that is no directory, sorted by path.

    Args:
        root: A directory.
        leave: A directory that is not entered, if it lies there (the output).
        report: Called with each directory that cannot be read.
        patterns: Directories that hold no match of these are not entered.

    Raises:
        UserError: ``root`` itself cannot be read.
    """
    seen = {_identity(os.stat(place)) for place in (leave,) if place is not None and place.is_dir()}
    found: list[Entry] = []
    pending = [(False, "")]  # a heap: what lies here itself, then what links lead to, by name
    while pending:
        linked, relative = heapq.heappop(pending)
        try:
            identity = _identity(os.stat(root / relative))
            if identity in seen:
                continue
            seen.add(identity)
            entries = [entry for entry in os.scandir(root / relative) if not entry.name.startswith(".")]
        except OSError as error:
            if not relative:
                raise UserError(f"{root}: cannot be read: {error.strerror}") from error
            report(f"{relative}/", Reason.unreadable, None)
            continue
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            item = Entry(path, _status(entry), linked or entry.is_symlink())
            if item.status is None or not stat.S_ISDIR(item.status.st_mode):
                found.append(item)
            elif any(_may_hold(path.split("/"), pattern.split("/")) for pattern in patterns):
                heapq.heappush(pending, (item.linked, path))
    return sorted(found)


def usable(entries: Iterable[Entry], root: Path, report: Report) -> list[str]:
    """Return the paths of regular files, each file once; report the rest."""
    regular = []
    for entry in entries:
        if entry.status is None:
            linked = (root / entry.path).is_symlink()
            report(entry.path, Reason.broken_link if linked else Reason.unreadable, None)
        elif not stat.S_ISREG(entry.status.st_mode):
            report(entry.path, Reason.special, 0)
        else:
            regular.append((entry.linked, entry.path, _identity(entry.status)))
    own = {identity for linked, _, identity in regular if not linked}
    first = {identity: path for linked, path, identity in reversed(regular) if linked}
    return [
        path for linked, path, identity in regular if not linked or (identity not in own and first[identity] == path)
    ]


def check_patterns(patterns: Sequence[str], root: Path) -> None:
    """Refuse patterns that are not relative to ``root``.

    Raises:
        UserError: One is empty, absolute, or leads out of ``root``.
    """
    for pattern in patterns:
        if not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
            raise UserError(f"globs={pattern!r}: not a pattern relative to {root}")


def matches(path: str, pattern: str) -> bool:
    """Match a relative path; ``*`` stays within a name, ``**`` is any number of directories."""
    return _matches(path.split("/"), pattern.split("/"))


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _may_hold(directory: list[str], pattern: list[str]) -> bool:
    """Tell if something below the directory may match."""
    if not directory:
        return bool(pattern)
    if not pattern:
        return False
    return pattern[0] == "**" or (fnmatchcase(directory[0], pattern[0]) and _may_hold(directory[1:], pattern[1:]))


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
