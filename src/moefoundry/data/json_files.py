"""JSON files of Hugging Face directories."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path}: unreadable: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as Hugging Face does."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse a file that git-lfs left in the place of a large one.

    Raises:
        UserError: The file is such a pointer.
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path}: a git-lfs pointer, not the file itself; `git lfs pull` there fetches it")
