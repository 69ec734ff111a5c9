"""Objects under a URL: prepared data and checkpoints in object stores.

``s3://``, ``gs://``, ``oci://`` and ``azure://`` are Composer's object stores, with its environment variables
(``S3_ENDPOINT_URL``, ...); all other URLs are fsspec's (``file://``, ``memory://``, ...). Whatever fails is tried
:data:`ATTEMPTS` times, after 1, 2, 4 ... seconds, at most :data:`LONGEST_WAIT`; what another attempt would not change
(:func:`is_permanent`) is not. A read that brings nothing for :data:`LONGEST_SILENCE` seconds has failed, whatever
time-outs the client has or lacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol, TypeVar

import tenacity

from moefoundry.config import UserError
from moefoundry.config.secrets import redact
from moefoundry.config.urls import OBJECT_STORES, resolved
from moefoundry.data.patience import unless_silent

T = TypeVar("T")
ATTEMPTS = 6
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
LONGEST_SILENCE = 90.0  # all attempts together stay below the default dist_timeout, in which other ranks wait
FIRST_SILENCE = 10.0
"""Seconds that a store may take to answer for the first time, when a run starts."""

PROBE = ".written-by-moefoundry"
PASSING_STATUS = (408, 409, 425, 429)  # of HTTP, among those that blame the caller
PASSING_CODES = ("RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "SlowDown")


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

        self._files, root = fsspec.core.url_to_fs(resolved(url))
        self._root = root.rstrip("/")

    def upload(self, file: Path, name: str) -> None:
        self._files.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
        self._files.put_file(str(file), self._path(name))

    def download(self, name: str, file: Path) -> None:
        self._files.get_file(self._path(name), str(file))

    def names(self, prefix: str) -> list[str]:
        paths = self._files.find(self._path(prefix))
        return [path.removeprefix(self._path("")) for path in paths]

    def remove(self, name: str) -> None:
        self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class Remote:
    """Objects under a URL, with retries.

    Args:
        url: ``scheme://...``, or a path.

    Raises:
        UserError: No store is known for the scheme, or it cannot be used here; or, from every method, the store still
            fails at the last attempt, or fails in a way that another attempt would not change.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._said: set[str] = set()
        kind = _ComposerStore if url.split("://")[0] in OBJECT_STORES else _FsspecStore
        try:
            self._store: _Store = kind(self.url)
        except Exception as error:  # whatever a client's constructor may raise
            raise UserError(f"{url}: no such store: {one_line(error)}") from error

    def upload(self, file: Path, name: str) -> None:
        """Store ``file`` as ``name``; what is there is replaced."""
        self._try(name, "upload", lambda: self._store.upload(file, name))

    def upload_bytes(self, content: bytes, name: str) -> None:
        """Store a small object, such as an empty one in place of what counts no more; see :meth:`discard`."""
        with NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.upload(Path(file.name), name)

    def discard(self, name: str) -> None:
        """Remove an object from a file system, or make it empty: a right to write in a store is no right to delete."""
        store = self._store
        if isinstance(store, _FsspecStore):
            self._try(name, "remove", lambda: store.remove(name))
        else:
            self.upload_bytes(b"", name)

    def download(self, name: str, file: Path) -> None:
        """Write the object to ``file``, which is either absent or whole."""
        numbers = count()

        def attempt() -> None:  # each has a file of its own: one that was given up may still write
            partial = file.with_name(f"{file.name}.{os.getpid()}-{next(numbers)}.partial")
            try:
                unless_silent(lambda: self._store.download(name, partial), lambda: _size_of(partial), LONGEST_SILENCE)
                partial.rename(file)
            finally:
                partial.unlink(missing_ok=True)

        self._try(name, "download", attempt)

    def names(self, prefix: str = "") -> list[str]:
        """List the objects whose names begin with ``prefix``."""
        return self._try(
            prefix, "list", lambda: unless_silent(lambda: self._store.names(prefix), lambda: 0, LONGEST_SILENCE)
        )

    def try_reading(self) -> None:
        """List the place once, and wait for :data:`FIRST_SILENCE` at most."""
        self._try("", "list", lambda: unless_silent(lambda: self._store.names(""), lambda: 0, FIRST_SILENCE), 1)

    def try_writing(self) -> None:
        """Write an object of a few bytes, :data:`PROBE`, and wait as long.

        It is removed from file systems. Object stores keep it: a right to write there is no right to delete.
        """
        with NamedTemporaryFile() as file:
            file.write(b"moefoundry writes this to see whether it can\n")
            file.flush()
            written = Path(file.name)
            upload = lambda: self._store.upload(written, PROBE)  # noqa: E731
            self._try(PROBE, "upload", lambda: unless_silent(upload, lambda: 0, FIRST_SILENCE), 1)
        if isinstance(self._store, _FsspecStore):
            self._store.remove(PROBE)

    def _try(self, name: str, verb: str, action: Callable[[], T], attempts: int | None = None) -> T:
        attempts = ATTEMPTS if attempts is None else attempts
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
            retry=tenacity.retry_if_exception(lambda error: not is_permanent(error)),
            before_sleep=lambda _: self._say_once(verb, retrying.statistics),
            reraise=True,
        )
        try:
            return retrying(action)
        except Exception as error:  # stores raise nearly anything
            tries = retrying.statistics.get("attempt_number", 1)
            place = f"{self.url}/{name}" if name else self.url
            raise UserError(f"{place}: cannot {verb} (attempts: {tries}): {one_line(error)}") from error

    def _say_once(self, verb: str, statistics: dict[str, Any]) -> None:
        """Print a line at the first failure; those of other files at the same time would say the same."""
        if verb not in self._said:
            self._said.add(verb)
            text = f"note: {redact(self.url)}: cannot {verb}; tried again, {ATTEMPTS} times at most"
            print(text, file=sys.stderr, flush=True)


def is_permanent(error: BaseException) -> bool:
    """Check whether another attempt would fail alike: something is missing, forbidden, malformed, or not installed."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)
    if isinstance(error, (*kinds, NotImplementedError)):
        return True
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)  # clients wrap what theirs raise
    return any("Credential" in type(link).__name__ or _blames_the_caller(link) for link in chain)


def _blames_the_caller(error: BaseException) -> bool:
    """Check whether an answer over HTTP has a lasting status of 4xx, wherever its client keeps it."""
    response = getattr(error, "response", None)
    status: Any = None
    if isinstance(response, dict):  # botocore
        if response.get("Error", {}).get("Code") in PASSING_CODES:
            return False
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status_code", "status", "code"):
        status = status if isinstance(status, int) else getattr(error, name, None)
    return isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUS


def one_line(error: BaseException) -> str:
    """Give the message of an error on one line, or the name of the error where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _size_of(partial: Path) -> int:
    """Count the bytes that have come; clients add endings of their own to the name, or make it a directory."""
    found = [path for place in partial.parent.glob(f"{partial.name}*") for path in (place, *place.rglob("*"))]
    size = 0
    for path in found:
        with suppress(OSError):  # it has been renamed meanwhile
            size += path.stat().st_size
    return size
