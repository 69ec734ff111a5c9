"""What takes seconds to make is made by one of the processes that the tests are divided among."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """Call ``make`` with an empty directory in the first process that asks; others take its result, and change nothing.

    Args:
        factory: Of pytest's temporary directories.
        name: The same in all processes.
        make: Its result can be pickled.
    """
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory, result = root / name, root / f"{name}.pickle"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a process that failed to make it
            directory.mkdir()
            made = pickle.dumps(make(directory))
            result.write_bytes(made)
    return pickle.loads(result.read_bytes())  # type: ignore[no-any-return]
