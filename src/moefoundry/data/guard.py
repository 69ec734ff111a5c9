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
- A sample is taken to lie in one shard, which is prepared ahead of it. Here a sample may be made of several
  (:meth:`GuardedDataset.shards_of`), and is made only when each of them is checked.
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

import mmap
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import streaming
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base import dataset as library
from streaming.base.constant import LOCALS, TICK
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
from moefoundry.data.identity import holds_documents
from moefoundry.data.patience import unless_silent
from moefoundry.data.segments import (
    MARKER,
    NodeFailure,
    free_number,
    remove_stale_segments,
    segments_directory,
    sole_starter,
)
from moefoundry.data.summary import LENGTHS_FILE

TESTED = "0.13.0"
FIRST_SILENCE = 30.0
"""Seconds that a store may take for the index, when a run starts."""


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
        self.place = f"{remote or local}/{split}"

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Read the shards of the index. Collective: an error of one node is raised on all.

        Raises:
            UserError: There is no index, it cannot be read, it differs from the remote one, or lacks the hash.
        """
        if self.remote is not None:
            problems = all_gather_object(self._fetch_small_files() if world.is_local_leader else None)
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

    def _fetch_small_files(self) -> str | None:
        """Download the remote index, and the lengths of documents; return the problem with them, if any."""
        problem = self._fetch(get_index_basename())
        if problem is None and holds_documents(self.directory) and not (self.directory / LENGTHS_FILE).exists():
            problem = self._fetch(LENGTHS_FILE)
        return problem

    def _fetch(self, name: str) -> str | None:
        """Download a file, once a node; return the problem with it, if any."""
        here, there = self.directory / name, f"{self.remote}/{self.split}/{name}"
        fresh = self.directory / f"{name}.{uuid.uuid4().hex}"  # nodes may share the directory
        partial = fresh.with_name(f"{fresh.name}.tmp")

        def progress() -> int:
            try:
                return partial.stat().st_size
            except FileNotFoundError:  # not there yet, or renamed already
                return 0

        try:
            unless_silent(lambda: self._download_file(name, fresh.name), progress, FIRST_SILENCE)
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


class GuardedDataset(StreamingDataset):
    """A ``StreamingDataset`` of :class:`CheckedStream` objects whose epochs are complete, or raise.

    Construction is collective. Every rank makes it at the same point, in a process group if there are several.

    Args:
        streams: Data to read.
        options: Options of ``StreamingDataset``.

    Raises:
        UserError: As :meth:`CheckedStream.get_shards`; or the cache is in use.
    """

    def __init__(self, streams: Sequence[CheckedStream], **options: Any) -> None:
        check_version()
        original, library.get_shm_prefix = library.get_shm_prefix, self._register
        try:
            super().__init__(streams=list(streams), **options)
        except ValueError as error:
            if "Reused local directory" not in str(error):
                raise
            caches = " or ".join(str(stream.directory) for stream in streams if stream.remote is not None)
            raise UserError(
                f"{caches}: the cache of another run on this machine; choose another dataset.local "
                "(if no other run is alive, another program has left /dev/shm/*_locals: remove it)"
            ) from error
        finally:
            library.get_shm_prefix = original
        if self._unique_rank_world.is_local_leader:
            self._shard_states.numpy()[:] = _ShardState.REMOTE  # whoever needs a shard first prepares, so checks, it
        barrier()
        self._prepared: set[int] = set()  # shards that this process knows to be
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
                with sole_starter():
                    remove_stale_segments()
                    taken = free_number(_check_and_find_retrying(local, remote, LOCALS, retry))
                    # the flag first: segments that a killed run leaves without one would stay
                    self._event: Any = NodeFailure.create(segments_directory() / _get_path(taken, MARKER))
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
            self._event = NodeFailure(segments_directory() / _get_path(number, MARKER))
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
            there = ", ".join(str(stream.directory) for stream in self.streams)
            raise DataError(f"{there}: the epoch ended after {delivered} of {self._expected} samples")

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        sample_ids = super()._get_work(epoch, sample_in_epoch)
        self._expected = int((sample_ids != -1).sum())
        return sample_ids

    def shards_of(self, sample_id: int) -> Sequence[int]:
        """List the shards that a sample is made of."""
        return (int(self.spanner[sample_id][0]),)

    def check_shards(self, shard_ids: Iterable[int]) -> None:
        """Prepare the shards that are not; return when all are, by whichever process.

        Raises:
            DataError: Some process of the node cannot have a shard.
        """
        for shard_id in shard_ids:
            if shard_id in self._prepared:  # a quick look, for every row
                continue
            while self._shard_states[shard_id] != _ShardState.LOCAL:
                self._event.raise_if_set()
                self.prepare_shard(shard_id)
            self._prepared.add(shard_id)

    def _prepare_thread(self, it: Any) -> None:
        """Prepare the shards of the next samples; another process may have begun with one."""
        while self._goes_on(it, it.prepare_index):
            sample_id = it.sample_ids[it.prepare_index]
            for shard_id in self.shards_of(sample_id) if sample_id != -1 else ():
                if shard_id not in self._prepared and self._shard_states[shard_id] == _ShardState.REMOTE:
                    self.prepare_shard(shard_id, blocking=False)
            it.prepare_index += 1
        it.on_exit()

    def _ready_thread(self, it: Any) -> None:
        """Wait until the shards of the next samples are prepared."""
        while self._goes_on(it, it.ready_index):
            sample_id = it.sample_ids[it.ready_index]
            self.check_shards(self.shards_of(sample_id) if sample_id != -1 else ())
            it.ready_index += 1
        it.on_exit()

    def _goes_on(self, it: Any, index: int) -> bool:
        """Wait until a thread at the sample ``index`` is no more than ``predownload`` ahead; False if it has to end."""
        assert self.predownload is not None, "the library gives it a default"
        while not (it.should_exit() or self._event.is_set() or index == it.total):
            if index - it.yield_index <= self.predownload:
                return True
            sleep(TICK)
        return False

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
