"""Inputs of commands, wherever they are.

A path is taken as it is. The files behind a URL are fetched for as long as they are needed, into the directory of
temporary files (``TMPDIR``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from moefoundry.checkpoint.manifest import COMMIT_FILE, MANIFEST_FILE, Manifest, damage
from moefoundry.checkpoint.remote import find_remote, is_downloaded, local_file, note_origin
from moefoundry.checkpoint.store import CHECKPOINTS
from moefoundry.config import UserError
from moefoundry.config.urls import is_url, resolved, url_problem
from moefoundry.data.stores import Remote


@contextmanager
def checkpoint_at(place: str) -> Iterator[Path]:
    """Give the directory of the checkpoint at a place, or of the run that holds it.

    The data files of one behind a URL are downloaded when they are read.

    Raises:
        UserError: The place is none, nothing is there, or the store fails.
    """
    with _scratch(place) as (path, scratch):
        if scratch is None:
            yield path
            return
        found = find_remote(place, scratch / "checkpoint")
        if found is None:
            raise UserError(f"{place}: no complete checkpoint there")
        yield found


@contextmanager
def checkpoints_at(place: str) -> Iterator[Path]:
    """Give the directory of a run's checkpoints, with at least their manifests and markers; or a checkpoint alone.

    Raises:
        UserError: The place is none, or the store fails.
    """
    with _scratch(place) as (path, scratch):
        if scratch is not None:
            path = _manifests(place, scratch)
        yield path


@contextmanager
def directory_at(place: str) -> Iterator[Path]:
    """Give a directory with all its files.

    Raises:
        UserError: The place is none, nothing is there, or the store fails.
    """
    with _scratch(place) as (path, scratch):
        if scratch is not None:
            path = scratch / (place.rstrip("/").rsplit("/", 1)[-1] or "directory")
            remote = Remote(place)
            names = [name for name in remote.names() if _is_plain(name)]
            if not names:
                raise UserError(f"{place}: nothing is there")
            for name in names:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                remote.download(name, path / name)
        yield path


@contextmanager
def _scratch(place: str) -> Iterator[tuple[Path, Path | None]]:
    """Give the path that a place names, and a temporary directory instead of it where it is behind a URL."""
    if problem := url_problem(place):
        raise UserError(f"{place}: {problem}")
    if not is_url(path := resolved(place)):
        yield Path(path), None
        return
    with TemporaryDirectory(prefix="moefoundry-") as scratch:
        yield Path(scratch), Path(scratch)


def _manifests(url: str, scratch: Path) -> Path:
    """Fetch marker and manifest of every checkpoint at or below a URL, into directories that lie as there.

    Those of a ``run_dir`` lie in its directory of checkpoints; what else of it looks like some is none of them.
    """
    remote = Remote(url)
    names = [name for name in remote.names() if _is_plain(name)]
    alone = COMMIT_FILE in names or MANIFEST_FILE in names
    root = scratch / (remote.url.rsplit("/", 1)[-1] if alone else "run")
    for name in names:
        inside, _, file = name.rpartition("/")
        if inside.rpartition("/")[0] not in ("", CHECKPOINTS) or (alone and inside):
            continue
        directory = root / inside
        directory.mkdir(parents=True, exist_ok=True)
        if file in (COMMIT_FILE, MANIFEST_FILE):
            remote.download(name, directory / file)
            note_origin(directory, f"{remote.url}/{inside}".rstrip("/"))
    return root


def fetched_damage(directory: Path) -> list[str]:
    """Call :func:`manifest.damage`; files of a checkpoint behind a URL are downloaded one by one, and removed."""
    if not is_downloaded(directory):
        return damage(directory)
    try:
        manifest = Manifest.read(directory)
    except UserError as error:
        return [str(error)]
    problems = []
    for name in manifest.files:
        try:
            local_file(directory, name)
            problems += manifest.problems(name)
        except UserError as error:
            problems.append(str(error))
        (directory / name).unlink(missing_ok=True)
    return problems


def _is_plain(name: str) -> bool:
    """Check that an object's name stays below the directory that it is downloaded to."""
    return not name.startswith("/") and ".." not in name.split("/")
