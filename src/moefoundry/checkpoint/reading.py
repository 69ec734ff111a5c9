"""Read shards from the files of a checkpoint ahead of their use, on threads, and check every byte on the way.

Where layout and dtype allow it, values are read straight into the tensor that they are for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from io import FileIO
from itertools import islice
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_64

from moefoundry.checkpoint.format import FileRange, RangeReader, layout_in, values_in, values_offset
from moefoundry.checkpoint.manifest import DATA_SUFFIX, HashRange, Manifest
from moefoundry.checkpoint.remote import local_file
from moefoundry.config import UserError

STEP_BYTES = 2**18  # hashed while they are in the processor's cache
THREADS = 2
AHEAD = 2


class Wanted(NamedTuple):
    """A shard to read.

    Attributes:
        name: Name of the tensor.
        place: Range of its bytes.
        shape: Shape that it must have.
        dtype: Dtype that it must have.
        into: Tensor that the values are to go into in the end, if they go there as they are.
    """

    name: str
    place: FileRange
    shape: torch.Size
    dtype: torch.dtype
    into: Tensor | None


class Read(NamedTuple):
    """A shard that has been read.

    Attributes:
        values: Checked values; in ``memory`` or, where that is possible, in place.
        memory: Memory to be given back (:meth:`ShardReader.release`) when the values are no longer needed.
        nbytes: Bytes read from the file.
    """

    values: Tensor
    memory: memoryview
    nbytes: int


class ShardReader:
    """Reads shards of the checkpoint that ``manifest`` belongs to; a context manager, which closes its files."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._spare: deque[memoryview] = deque()
        self._open = cache(self._open_file)
        self._opening = Lock()
        self._files = ExitStack()
        self._pool = self._files.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="load"))

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.close()

    def ahead(self, shards: Iterable[Wanted]) -> Iterator[Future[Read]]:
        """Read shards in order. The first :data:`AHEAD` begin at once, and one more with each that is taken.

        A result raises ``UserError`` for bytes that are missing or not as saved; damaged files may raise other errors.
        """
        readings = (self._pool.submit(self._read, shard) for shard in shards)
        begun = deque(islice(readings, AHEAD))

        def taken() -> Iterator[Future[Read]]:
            for reading in readings:
                begun.append(reading)
                yield begun.popleft()
            yield from begun

        return taken()

    def release(self, read: Read) -> None:
        """Let further shards have its memory."""
        self._spare.append(read.memory)

    def _read(self, shard: Wanted) -> Read:
        name, place, shape, dtype, into = shard
        if not place.file.endswith(DATA_SUFFIX):  # memory is allocated by the lengths of its hash ranges
            raise UserError(
                f"{self._manifest.directory / place.file}: no file of tensors; tensor {name} cannot be there"
            )
        ranges = self._manifest.covering(place.file, place.offset, place.length)
        with self._opening:  # else each thread would download it
            stream = self._open(place.file)
        part = RangeReader(stream.fileno(), place.offset, place.length)
        layout = layout_in(part, shape, dtype)
        before, length = place.offset - ranges[0].offset, ranges[-1].end - ranges[0].offset
        if into is not None and _same_memory(into, layout):
            before += values_offset(layout)
            memory = self._memory(length - into.nbytes)
            inside = memoryview(into.reshape(-1).view(torch.uint8).numpy().data)
            self._fill(stream, ranges, [memory[:before], inside, memory[before : length - into.nbytes]], name)
            values = into
        else:
            memory = self._memory(length)
            self._fill(stream, ranges, [memory[:length]], name)
            values = values_in(memory, before, layout)
        return Read(values, memory, length + part.bytes_read)

    def _fill(self, stream: FileIO, ranges: Sequence[HashRange], memories: Sequence[memoryview], name: str) -> None:
        """Read hash ranges that follow each other into memories of the same length together, and check them."""
        path, offset, left = Path(str(stream.name)), ranges[0].offset, deque(ranges)
        hashed = xxh3_64()
        for memory in memories:
            position = 0
            while position < len(memory):
                current = left[0]
                step = min(STEP_BYTES, len(memory) - position, current.end - offset)
                count = os.preadv(stream.fileno(), [memory[position : position + step]], offset)
                if not count:
                    place = f"{path}: offset {offset}, tensor {name}"
                    raise UserError(f"{place}: the file ends there, not at {ranges[-1].end} or later")
                hashed.update(memory[position : position + count])
                position, offset = position + count, offset + count
                if offset == current.end:
                    if hashed.hexdigest() != current.digest:
                        raise UserError(f"{path}: offset {current.offset}, tensor {name}: {current.damage}")
                    left.popleft()
                    hashed = xxh3_64()

    def _memory(self, length: int) -> memoryview:
        """Get at least ``length`` bytes, which no other shard has."""
        if self._spare and len(spare := self._spare.popleft()) >= length:
            return spare
        return memoryview(bytearray(length))

    def _open_file(self, name: str) -> FileIO:
        path = self._manifest.directory / name
        if not path.exists():
            path = local_file(self._manifest.directory, name)
        return self._files.enter_context(path.open("rb", buffering=0))


def _same_memory(values: Tensor, layout: Tensor) -> bool:
    """Check whether the bytes of a stored tensor, put into ``values`` as they are, make its values."""
    same = values.dtype == layout.dtype and values.is_cpu and values.is_contiguous() and layout.is_contiguous()
    return same and layout.untyped_storage().nbytes() == values.nbytes
