"""Values of keys that name a file or directory."""

from __future__ import annotations

import os.path

LONGEST_NAME = 255  # bytes of one name, and below:
LONGEST_PATH = 3_500  # of a path, under which a run writes others; the usual file systems end at 4,096


def expanded(path: str) -> str:
    """``path`` with ``~`` and ``~user`` as the home directory. URLs, and names of users that there are not, stay."""
    return os.path.expanduser(path)


def naming_problem(path: str) -> str:
    """Why no file can have this (expanded) path; empty where one can. Nothing is looked for on disk."""
    if not path:
        return "is empty"
    if "\0" in path:
        return "holds a NUL character"
    if path.startswith("~"):
        return f"{path.partition('/')[0]} is no user of this machine"
    if "://" in path:
        return ""
    if len(path.encode()) > LONGEST_PATH:
        return f"is longer than {LONGEST_PATH} bytes"
    if any(len(name.encode()) > LONGEST_NAME for name in path.split("/")):
        return f"has a name of more than {LONGEST_NAME} bytes in it"
    return ""
