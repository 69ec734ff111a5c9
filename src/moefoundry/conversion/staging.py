"""What is written gets its final name when it is complete; a conversion that fails leaves nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moefoundry.checkpoint.ranks import describe
from moefoundry.checkpoint.store import STAGING_SUFFIX
from moefoundry.config import UserError

GIB = 2**30


@contextmanager
def staged(target: Path, nbytes: int = 0) -> Iterator[Path]:
    """A path to write to. It becomes ``target`` at the end, and is removed if an error is raised.

    Args:
        target: The file or directory to make.
        nbytes: What will be written, at least; the disk must have it free.

    Raises:
        UserError: ``target`` exists, or the disk is full, or may not be written to, or fails.
    """
    try:
        if target.exists():
            raise UserError(f"{target} exists already; nothing is overwritten")
        staging = target.with_name(target.name + STAGING_SUFFIX)
        staging.parent.mkdir(parents=True, exist_ok=True)
        _remove(staging)
        _check_space(staging.parent, nbytes)
        try:
            yield staging
            staging.rename(target)
        finally:
            with suppress(OSError):  # where even that fails, the error that led here is the one to tell
                _remove(staging)
    except OSError as error:
        raise UserError(f"cannot write {target}: {describe(error)}") from error


def _check_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise UserError(f"{directory}: {nbytes / GIB:.2f} GiB are needed, and {free / GIB:.2f} GiB are free there")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
