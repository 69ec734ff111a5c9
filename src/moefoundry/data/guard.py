"""Guards around mosaicml-streaming: a shard that cannot be trusted ends the run with an error that names it.

The only file that replaces private parts of the library (``loader.py`` derives from the class here), so it warns where
another version is installed than :data:`TESTED`. The library's own behaviour, and the reason of each change:

- A prefetch thread that fails sets a flag of its process, which the loop over samples takes for the end of the epoch:
  training goes on, or ends with exit status 0. Here the flag carries the reason, the loop raises it, and the samples
  of every epoch are counted, whatever ended it.
- The failed shard stays "being prepared" for ever, so that the other processes of the node wait for it. Here the flag
  is one file of the node (:class:`NodeFailure`), and the shard goes back to "remote".
- Only a download is validated. A shard that lies there already is not, not even the corrupt download that ended the
  run before. Here every shard starts as "remote", and "preparing" it checks its hash (:class:`CheckedStream`): in the
  prefetch thread, ahead of its first sample, and once a node, as the library's own states see to.
- A cached index is never compared with the remote one. Here it is, at the start.
- Segments of shared memory that a killed run has left make its cache "in use" for ever. Here a run that starts removes
  those of dead runs of this program (:func:`remove_stale_segments`).
- Every rank looks for itself which number is free for the segments, so runs that start at once take the same, and one
  that ends meanwhile leaves the ranks of another with different ones. Here the node's leader alone looks, and takes the
  number, while no other process of the machine may (:meth:`GuardedDataset._register`).

A process that dies while it prepares a shard is not noticed here: its rank's DataLoader notices a dead worker, and
launchers end every rank when one ends.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import streaming
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base import dataset as library
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.dataset import _ShardState
from streaming.base.distributed import all_gather_object, barrier
from streaming.base.format import FileInfo, Reader, get_index_basename
from streaming.base.hashing import get_hash, is_hash
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_and_find_retrying, _get_path, _pack_locals
from streaming.base.world import World

from moefoundry.config.errors import DataError, UserError
from moefoundry.config.urls import resolved
from moefoundry.data import downloads as downloads
from moefoundry.data.fit import missing_hash
from moefoundry.data.patience import unless_silent

TESTED = "0.13.0"
MARKER = "moefoundry"  # follows the number that begins the names of a dataset's segments
SEGMENTS = Path("/dev/shm")
FIRST_SILENCE = 30.0
"""Seconds that a store may take for the index, when a run starts."""

PATIENCE = 60.0
"""Seconds to wait for others that start; each takes well under one."""


def check_version() -> None:
    """Warn if another version of the library is installed than the one that this file was tested with."""
    if streaming.__version__ != TESTED:
        installed = f"mosaicml-streaming {streaming.__version__} is installed"
        warnings.warn(f"{installed}, and moefoundry is tested with mosaicml-streaming=={TESTED}", stacklevel=2)


class CheckedStream(Stream):
    """Stream whose shards are checked against the index before any of their samples are read.

    Args:
        local: Directory of the data, or the cache of the remote ones.
        remote: Place that missing shards are downloaded from; None if all data are local.
        split: Sub-directory of both.
        algorithm: Hash to check, which the index must have of every shard; None compares sizes alone.
    """

    def __init__(self, *, local: str, remote: str | None, split: str, algorithm: str | None) -> None:
        super().__init__(local=resolved(local), remote=remote and resolved(remote), split=split)
        self.algorithm = algorithm
        self.directory = Path(resolved(local), split)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Read the shards of the index. Collective: an error of one node is raised on all.

        Raises:
            UserError: There is no index, it cannot be read, it differs from the remote one, or lacks the hash.
        """
        if self.remote is not None:
            problems = all_gather_object(self._fetch_index() if world.is_local_leader else None)
            if (problem := next(filter(None, problems), None)) is not None:
                raise UserError(problem)
        index = self.directory / get_index_basename()
        try:
            shards = super().get_shards(world, allow_unsafe_types)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: cannot be read: {error}") from error
        for info in (info for shard in shards for info, _ in shard.file_pairs):
            hashes = [name for name in info.hashes if is_hash(name)]
            if message := missing_hash(index, info.basename, hashes, self.algorithm):
                raise UserError(message)
        return shards

    def _fetch_index(self) -> str | None:
        """Download the remote index, once a node; return the problem with it, if any."""
        name = get_index_basename()
        here, there = self.directory / name, f"{self.remote}/{self.split}/{name}"
        fresh = self.directory / f"{name}.{uuid.uuid4().hex}"  # nodes may share the directory
        try:
            unless_silent(lambda: self._download_file(name, fresh.name), lambda: 0, FIRST_SILENCE)
        except Exception as error:  # every store has its own
            return f"{there}: cannot be downloaded: {' '.join(str(error).split()) or repr(error)}"
        if not here.exists():
            fresh.rename(here)
            return None
        same = fresh.read_bytes() == here.read_bytes()
        fresh.unlink()
        return None if same else f"{here}: differs from {there}: a cache of other data; delete {self.directory}"

    def prepare_shard(self, shard: Reader) -> int:
        """Download the shard if it is missing, and check it either way. Returns the bytes added to the cache.

        Raises:
            DataError: It cannot be had, or is not what the index says. A bad download is removed.
        """
        files = [self.directory / info.basename for pair in shard.file_pairs for info in pair if info]
        missing = [file for file in files if not file.exists()]
        if self.remote is None and missing == files:
            raise DataError(f"{files[0]}: missing shard")
        try:
            added = super().prepare_shard(shard)
            for info, _ in shard.file_pairs:
                self._check(info)
        except Exception as error:
            downloaded = [file for file in missing if file.exists()]
            for file in downloaded if self.remote is not None else []:
                file.unlink()
            if not missing:
                remedy = "prepare the data again" if self.remote is None else "delete it, and it is downloaded again"
                raise DataError(f"{files[0]}: {error}; {remedy}") from error
            raise DataError(f"{self.remote}/{self.split}/{files[0].name}: {error or repr(error)}") from error
        return added

    def _check(self, info: FileInfo) -> None:
        path = self.directory / info.basename
        if (size := path.stat().st_size) != info.bytes:
            raise ValueError(f"truncated shard: {size} bytes of {info.bytes}")
        if self.algorithm is None or not size:
            return
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if get_hash(self.algorithm, content) != info.hashes[self.algorithm]:
                raise ValueError(f"corrupt shard: its {self.algorithm} is not the one in the index")


class NodeFailure:
    """Flag of the library "a background thread has failed", shared by all processes of a node, with the reason.

    A file that is empty until something fails. It lies beside the dataset's segments of shared memory, under their
    number; while the process that created it lives, a lock on it says that the segments are in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)

    def __reduce__(self) -> tuple[type[NodeFailure], tuple[Path]]:
        return type(self), (self.path,)  # DataLoader workers that are not forked get it pickled

    @classmethod
    def create(cls, path: Path) -> NodeFailure:
        """Create the file; it is locked by the time that it can be seen. Removed when the process ends."""
        hidden = path.with_name(f".{path.name}")
        hidden.unlink(missing_ok=True)
        failure = cls(hidden)
        fcntl.flock(failure._file, fcntl.LOCK_EX)
        failure.path = hidden.rename(path)
        weakref.finalize(failure, _remove_in, os.getpid(), path)
        return failure

    def set(self, reason: str = "a shard could not be read") -> None:
        """Note a failure. One write is atomic, and the first counts."""
        self._file.write(f"{reason}\n".encode())

    def is_set(self) -> bool:
        """Tell if anything has failed in any process of the node."""
        return os.fstat(self._file.fileno()).st_size > 0

    def raise_if_set(self) -> None:
        """Do nothing unless something has failed.

        Raises:
            DataError: Gives the reason of the first failure.
        """
        if self.is_set():
            reasons = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
            raise DataError(reasons.decode().partition("\n")[0])


def _remove_in(process: int, path: Path) -> None:
    if os.getpid() == process:  # not in its forked workers
        path.unlink(missing_ok=True)


def _segments_directory() -> Path:
    """Return the directory of shared memory; where there is none (macOS), only the flag is a file, a temporary one."""
    return SEGMENTS if SEGMENTS.is_dir() else Path(gettempdir())


@contextmanager
def _sole_starter() -> Iterator[None]:
    """Let one process of the machine at a time, of any user, run the body.

    The lock is one of the directory itself, which every user may open; a file for it could belong to another. The body
    must not be collective: of two jobs that share two nodes, each could hold the lock that the other waits for.

    Raises:
        UserError: Another process holds the lock too long.
    """
    path = _segments_directory()
    directory = os.open(path, os.O_RDONLY)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _try_lock(directory):
            if time.monotonic() > deadline:
                raise UserError(f"{path}: a process has locked it for {PATIENCE:.0f} seconds; `fuser {path}` names it")
            time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(directory, fcntl.LOCK_UN)  # closing alone would leave it to a process forked meanwhile
    finally:
        os.close(directory)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free_number(first: int) -> int:
    """Find the first number that begins no name of a segment, of a flag or of the library's lock files."""
    directories = {_segments_directory(), Path(gettempdir())}
    taken = {path.name.partition("_")[0] for directory in directories for path in directory.glob("[0-9]*_*")}
    return next(number for number in count(first) if f"{number:06}" not in taken)


def remove_stale_segments() -> None:
    """Remove the shared memory of dead runs of this program.

    A run's segments are told by the file of its :class:`NodeFailure`, whose lock the kernel drops when the process
    dies, however it dies. Segments without such a file are of other programs, or of another user, and stay.
    """
    for path in _segments_directory().glob(f"[0-9]*_{MARKER}"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue  # replaced by another run's since it was opened
                for name in SHM_TO_CLEAN:
                    path.with_name(path.name.replace(MARKER, name)).unlink(missing_ok=True)
                path.unlink()
        except OSError:  # locked: its run lives; gone; or not ours to open
            continue


class GuardedDataset(StreamingDataset):
    """A ``StreamingDataset`` of one :class:`CheckedStream` whose epochs are complete, or raise.

    Construction is collective. Every rank makes it at the same point, in a process group if there are several.

    Args:
        stream: Data to read.
        options: Options of ``StreamingDataset``.

    Raises:
        UserError: As :meth:`CheckedStream.get_shards`; or the cache is in use.
    """

    def __init__(self, stream: CheckedStream, **options: Any) -> None:
        check_version()
        original, library.get_shm_prefix = library.get_shm_prefix, self._register
        try:
            super().__init__(streams=[stream], **options)
        except ValueError as error:
            if "Reused local directory" not in str(error):
                raise
            raise UserError(
                f"{stream.directory}: the cache of another run on this machine; choose another dataset.local "
                "(if no other run is alive, another program has left /dev/shm/*_locals: remove it)"
            ) from error
        finally:
            library.get_shm_prefix = original
        if self._unique_rank_world.is_local_leader:
            self._shard_states.numpy()[:] = _ShardState.REMOTE  # whoever needs a shard first prepares, so checks, it
        barrier()
        self._expected = 0

    def _register(
        self, local: list[str], remote: list[str | None], world: World, retry: int = 100
    ) -> tuple[int, SharedMemory]:
        """Take a number for the segments of this dataset; ``StreamingDataset`` calls it as its ``get_shm_prefix``.

        Collective: an error of one node is raised on all.

        Args:
            local: Directory of each stream's data.
            remote: Remote place of each, or None.
            world: Place of this rank.
            retry: Attempts to find a cache no longer in use; each takes 7 ms.

        Returns:
            The number, the same on a node, and the segment that lists the directories in use.

        Raises:
            ValueError: A cache is in use.
            UserError: Another process keeps this run from starting.
            OSError: The segment cannot be created.
        """
        taken: int | Exception | None = None
        if world.is_local_leader:
            try:
                with _sole_starter():
                    remove_stale_segments()
                    taken = _free_number(_check_and_find_retrying(local, remote, LOCALS, retry))
                    # the flag first: segments that a killed run leaves without one would stay
                    self._event: Any = NodeFailure.create(_segments_directory() / _get_path(taken, MARKER))
                    content = _pack_locals(local, taken)
                    segment = SharedMemory(_get_path(taken, LOCALS), True, len(content))
                    segment.buf[: len(content)] = content
            except Exception as error:  # whatever it is, the others wait to hear of it
                taken = error
        by_rank = all_gather_object(taken)
        if (problem := next((each for each in by_rank if isinstance(each, Exception)), None)) is not None:
            raise problem
        number = by_rank[world.rank - world.rank_of_node]
        assert isinstance(number, int)
        if not world.is_local_leader:
            segment = SharedMemory(_get_path(number, LOCALS), False)
            self._event = NodeFailure(_segments_directory() / _get_path(number, MARKER))
        return number, segment

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of this process in this epoch.

        Raises:
            DataError: Some process of the node cannot have a shard, or the epoch ends before its last sample.
        """
        self._event.raise_if_set()
        delivered = 0
        for sample in super().__iter__():
            delivered += 1
            yield sample
        self._event.raise_if_set()
        if delivered != self._expected:
            there = self.streams[0].directory
            raise DataError(f"{there}: the epoch ended after {delivered} of {self._expected} samples")

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        sample_ids = super()._get_work(epoch, sample_in_epoch)
        self._expected = int((sample_ids != -1).sum())
        return sample_ids

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return one sample; see ``StreamingDataset``.

        Raises:
            DataError: Some process of the node cannot have a shard.
        """
        self._event.raise_if_set()
        return super().get_item(sample_id, retry)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download and check a shard on this node; see ``StreamingDataset``."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            self._event.set(str(error))
            self._shard_states[shard_id] = _ShardState.REMOTE  # nobody waits for it any longer
            raise

    def on_exception(self, future: Future[None]) -> None:
        """Note the failure of a background thread; called as it ends."""
        if (error := future.exception()) is not None:
            self._event.set(str(error) if isinstance(error, UserError) else repr(error))
            self._iterator.on_exit()  # which a thread that fails leaves out, so that the next epoch waits for it
