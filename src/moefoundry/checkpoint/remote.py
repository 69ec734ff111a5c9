"""Checkpoints in object stores, beside those in ``run_dir``.

A remote checkpoint has the files of a local one, under ``{url}/ba{batch}/``. They are uploaded in the order in which
a save writes them: data, manifest, and the marker ``COMMITTED`` last. Readers look for markers, so that what an upload
has left unfinished is no checkpoint to anyone.

To resume, rank 0 downloads the small files into a local directory, beside a note of where they come from. It is then
a checkpoint like any other, except that :func:`local_file` downloads a data file when the one rank that reads it opens
it.

``s3://``, ``gs://``, ``oci://`` and ``azure://`` are Composer's object stores, with its environment variables
(``S3_ENDPOINT_URL``, ...); all other URLs are fsspec's (``file://``, ``memory://``, ...). Whatever fails is tried
:data:`ATTEMPTS` times, after 1, 2, 4 ... seconds, at most :data:`LONGEST_WAIT`; what is missing or forbidden is not. A
read that brings nothing for :data:`LONGEST_SILENCE` seconds has failed, whatever time-outs the client has or lacks.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

import tenacity

from moefoundry.checkpoint.manifest import COMMIT_FILE, MANIFEST_FILE
from moefoundry.config import UserError

T = TypeVar("T")
ATTEMPTS = 6
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
LONGEST_SILENCE = 90.0  # all attempts together stay below the default dist_timeout, in which other ranks wait
ORIGIN_FILE = "origin.json"
COMPOSER_SCHEMES = ("s3", "gs", "oci", "azure")
TRANSFERS = 4
_BATCH = re.compile(r"(?:.*/)?ba(\d+)/")
_log = logging.getLogger(__name__)


class _Store(Protocol):
    """Objects by name."""

    def upload(self, file: Path, name: str) -> None: ...

    def download(self, name: str, file: Path) -> None: ...

    def names(self, prefix: str) -> list[str]: ...


class _ComposerStore:
    def __init__(self, url: str) -> None:
        from composer.utils import maybe_create_object_store_from_uri, parse_uri

        self._store: Any = maybe_create_object_store_from_uri(url)
        self._root = parse_uri(url)[2].rstrip("/")

    def upload(self, file: Path, name: str) -> None:
        self._store.upload_object(self._path(name), str(file))

    def download(self, name: str, file: Path) -> None:
        self._store.download_object(self._path(name), str(file), overwrite=True)

    def names(self, prefix: str) -> list[str]:
        start = self._path("")
        return [path.removeprefix(start) for path in self._store.list_objects(start + prefix)]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name


class _FsspecStore:
    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]

        self._files, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")

    def upload(self, file: Path, name: str) -> None:
        self._files.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
        self._files.put_file(str(file), self._path(name))

    def download(self, name: str, file: Path) -> None:
        self._files.get_file(self._path(name), str(file))

    def names(self, prefix: str) -> list[str]:
        paths = self._files.find(self._path(prefix))
        return [path.removeprefix(self._path("")) for path in paths]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class Remote:
    """Objects under a URL, with retries.

    Args:
        url: ``scheme://...``.

    Raises:
        UserError: No store is known for the scheme, or it cannot be used here; or, from every method, the store still
            fails at the last attempt, or does not have the object or the right.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        kind = _ComposerStore if url.split("://")[0] in COMPOSER_SCHEMES else _FsspecStore
        try:
            self._store: _Store = kind(self.url)
        except Exception as error:  # whatever a client's constructor may raise
            raise UserError(f"{url}: no such store: {error}") from error

    def upload(self, file: Path, name: str) -> None:
        """Store ``file`` as ``name``; what is there is replaced."""
        self._try(name, "upload", lambda: self._store.upload(file, name))

    def download(self, name: str, file: Path) -> None:
        """Write the object to ``file``, which is either absent or whole."""
        numbers = count()

        def attempt() -> None:  # each has a file of its own: one that was given up may still write
            partial = file.with_name(f"{file.name}.{os.getpid()}-{next(numbers)}.partial")
            try:
                unless_silent(lambda: self._store.download(name, partial), lambda: _size_of(partial))
                partial.rename(file)
            finally:
                partial.unlink(missing_ok=True)

        self._try(name, "download", attempt)

    def names(self, prefix: str = "") -> list[str]:
        """Objects whose names begin with ``prefix``."""
        return self._try(prefix, "list", lambda: unless_silent(lambda: self._store.names(prefix), lambda: 0))

    def _try(self, name: str, verb: str, action: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
            retry=tenacity.retry_if_not_exception_type((FileNotFoundError, PermissionError)),
            before_sleep=tenacity.before_sleep_log(_log, logging.WARNING),
            reraise=True,
        )
        try:
            return retrying(action)
        except Exception as error:  # stores raise nearly anything
            tries = retrying.statistics.get("attempt_number", 1)
            raise UserError(f"{self.url}/{name}: cannot {verb} (attempts: {tries}): {error}") from error


def unless_silent(action: Callable[[], T], progress: Callable[[], int]) -> T:
    """The result of ``action``, which runs in a thread.

    Args:
        action: What may never return.
        progress: A number that changes while it is alive.

    Raises:
        TimeoutError: The number has been the same for :data:`LONGEST_SILENCE` seconds; the thread is given up.
        Exception: What ``action`` raises.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    before = progress()
    while not wait([outcome], LONGEST_SILENCE).done:
        if (now := progress()) == before:
            raise TimeoutError(f"nothing has come for {LONGEST_SILENCE:g} seconds")
        before = now
    return outcome.result()


def _size_of(partial: Path) -> int:
    """Bytes that have come; clients add endings of their own to the name, or make it a directory's."""
    found = [path for place in partial.parent.glob(f"{partial.name}*") for path in (place, *place.rglob("*"))]
    size = 0
    for path in found:
        with suppress(OSError):  # it has been renamed meanwhile
            size += path.stat().st_size
    return size


def is_url(path: str) -> bool:
    """Whether a path names a remote store."""
    return "://" in path


def upload_checkpoint(directory: Path, url: str) -> None:
    """Copy a committed checkpoint to ``{url}/{name of the directory}``; one process does it.

    Raises:
        UserError: The store fails for good. No reader sees the checkpoint then.
    """
    remote = Remote(f"{url.rstrip('/')}/{directory.name}")
    last = (MANIFEST_FILE, COMMIT_FILE)
    data = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(lambda name: remote.upload(directory / name, name), (n for n in data if n not in last)))
    for name in last:
        remote.upload(directory / name, name)


def find_remote(url: str, cache: Path) -> Path | None:
    """The checkpoint at a URL, or the newest below it, as a local directory that lacks the data files.

    Args:
        url: Of a checkpoint, of the place that holds a run's, or of its ``run_dir``.
        cache: Where the directory is made; what an earlier search has left there is removed.

    Returns:
        The directory; None where there is no complete checkpoint.

    Raises:
        UserError: The store fails for good.
    """
    remote = Remote(url)
    names = remote.names()
    found = [name.removesuffix(COMMIT_FILE) for name in names if name.rsplit("/", 1)[-1] == COMMIT_FILE]
    if not found:
        return None
    place = "" if "" in found else max(found, key=_batch)
    checkpoint = Remote(f"{remote.url}/{place}")
    shutil.rmtree(cache, ignore_errors=True)
    directory = cache / checkpoint.url.rsplit("/", 1)[-1]
    directory.mkdir(parents=True)
    for name in (name.removeprefix(place) for name in names if name.startswith(place)):
        if "/" not in name and not name.endswith(".distcp"):
            checkpoint.download(name, directory / name)
    (directory / ORIGIN_FILE).write_text(json.dumps({"url": checkpoint.url}))
    return directory


def _batch(place: str) -> int:
    match = _BATCH.fullmatch(place)
    return int(match[1]) if match else -1


def local_file(directory: Path, name: str) -> Path:
    """A file of a checkpoint; downloaded first, if the checkpoint is a remote one and it is not here yet.

    Raises:
        UserError: The store fails for good.
    """
    path, origin = directory / name, directory / ORIGIN_FILE
    if not path.exists() and origin.exists():
        Remote(json.loads(origin.read_text())["url"]).download(name, path)
    return path


def is_downloaded(directory: Path) -> bool:
    """Whether this is the local directory of a remote checkpoint."""
    return (directory / ORIGIN_FILE).exists()
