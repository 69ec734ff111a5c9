"""Write the files of a checkpoint in the format of torch's distributed checkpoint (DCP), and commit them.

    __{rank}_{n}.distcp     shards, each as ``torch.save`` writes it
    .metadata               DCP's index: which box of which tensor is where
    state.json              everything that is not a tensor

DCP's own writer keeps the tensors of a file until it is complete. Here each shard goes to the file as it comes, and
every byte is hashed on the way (``manifest.py``).
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from moefoundry.checkpoint.format import METADATA_FILE, Box, FileRange, TensorSpec
from moefoundry.checkpoint.manifest import RANGE_BYTES, STATE_FILE, HashRange, Origin, commit, write_synced

_ALIGNMENT = 64  # torch aligns tensors within what it saves; with the start aligned too, mapped tensors are
_STEP_BYTES = 2**20  # hashed and then written while they are in the processor's cache


class Shard(NamedTuple):
    """A box of the tensor ``name``, without its values."""

    name: str
    tensor: TensorSpec
    box: Box

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.box.numel * self.tensor.dtype.itemsize


SavePlan = Sequence[Sequence[Shard]]
"""Shards that each rank writes, in this order."""


class WrittenFile(NamedTuple):
    """A complete file of shards.

    Attributes:
        name: Name of the file.
        shards: Range of each shard, in the order in which they were written.
        hashes: Hash ranges of the whole file.
    """

    name: str
    shards: Sequence[FileRange]
    hashes: Sequence[HashRange]


def data_file(rank: int, number: int = 0) -> str:
    """Name of a file of shards."""
    return f"__{rank}_{number}.distcp"


class HashedFile:
    """A file of shards, written from its first byte to its last.

    Attributes:
        size: Bytes so far.

    Raises:
        OSError: The disk is full, or fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hashes: list[HashRange] = []
        self._shards: list[FileRange] = []
        self._start = 0  # of the hash range that is being written
        self._stream = path.open("wb", buffering=2 * _STEP_BYTES)
        self._hash = xxhash.xxh3_64()
        self._failure: OSError | None = None

    def append(self, values: Tensor) -> None:
        """Write the values of a shard; its first byte is a hash range's first byte."""
        self.write(bytes(-self.size % _ALIGNMENT))
        self._end_range()
        offset = self.size
        values = values.detach().cpu()
        whole = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
        with _no_crc32():
            contiguous = values if whole else values.clone(memory_format=torch.contiguous_format)
            try:
                torch.save(contiguous, cast(IO[bytes], self))
            except RuntimeError as error:  # by which torch replaces what its stream raises
                raise self._failure or error from error
        self._shards.append(FileRange(self.path.name, offset, self.size - offset))

    def write(self, data: Any) -> int:
        """Write bytes; ``torch.save`` calls it."""
        view = memoryview(data).cast("B")
        position = 0
        while position < len(view):
            room = RANGE_BYTES - (self.size - self._start)
            step = view[position : position + min(room, _STEP_BYTES)]
            self._hash.update(step)
            try:
                self._stream.write(step)
            except OSError as error:
                self._failure = error
                raise
            position += len(step)
            self.size += len(step)
            if len(step) == room:
                self._end_range()
        return len(view)

    def flush(self) -> None:
        """Do nothing: ``torch.save`` calls it after each tensor, when nothing depends on it."""

    def close(self) -> WrittenFile:
        """Write everything through to the disk."""
        self._end_range()
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return WrittenFile(self.path.name, self._shards, self._hashes)

    def abort(self) -> None:
        """Close without a promise, after an error."""
        with suppress(OSError):
            self._stream.close()

    def _end_range(self) -> None:
        if self.size > self._start:
            self._hashes.append(HashRange(self._start, self.size - self._start, self._hash.hexdigest()))
            self._start = self.size
            self._hash.reset()


def write_file(path: Path, values: Sequence[Tensor]) -> WrittenFile:
    """Write a rank's shards into one file.

    Raises:
        OSError: The disk is full, or fails; the file is removed.
    """
    file = HashedFile(path)
    try:
        for tensor in values:
            file.append(tensor)
        return file.close()
    except BaseException as error:
        file.abort()
        path.unlink()
        if isinstance(error, OSError):  # a failed write does not know its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def commit_files(
    directory: Path,
    plan: SavePlan,
    files: Sequence[WrittenFile],
    state: Mapping[str, Any],
    origin: Origin,
) -> None:
    """Make complete files a checkpoint: index, state, manifest, marker.

    Args:
        directory: The staging directory.
        plan: Shards of each file.
        files: The files, in the same order, complete and on the disk.
        state: JSON document.
        origin: Origin of the checkpoint.

    Raises:
        OSError: The disk is full, or fails.
        UserError: As :func:`~moefoundry.checkpoint.manifest.commit`.
        ValueError: The shards of a tensor do not make it up.
    """
    shards = [shard for of_file in plan for shard in of_file]
    check_whole(shards)
    places = [place for file in files for place in file.shards]
    entries: dict[str, TensorStorageMetadata] = {}
    for shard in shards:
        empty = TensorStorageMetadata(TensorProperties(shard.tensor.dtype), torch.Size(shard.tensor.shape), [])
        chunks = entries.setdefault(shard.name, empty).chunks
        chunks.append(ChunkStorageMetadata(torch.Size(shard.box.first), shard.box.sizes))
    metadata = Metadata(
        state_dict_metadata=dict(entries),
        storage_data={
            MetadataIndex(shard.name, shard.box.first): _StorageInfo(*place)
            for shard, place in zip(shards, places, strict=True)
        },
        storage_meta=StorageMeta(),
    )
    small = {
        METADATA_FILE: write_synced(directory / METADATA_FILE, pickle.dumps(metadata)),
        STATE_FILE: write_synced(directory / STATE_FILE, json.dumps(state, indent=1).encode()),
    }
    commit(directory, origin, {**{file.name: file.hashes for file in files}, **small})


def check_whole(shards: Iterable[Shard]) -> None:
    """Check that the shards of each tensor make it up.

    Raises:
        ValueError: They do not, or disagree on its shape or dtype.
    """
    values: dict[str, int] = {}
    tensors: dict[str, TensorSpec] = {}
    for shard in shards:
        values[shard.name] = values.get(shard.name, 0) + shard.box.numel
        if tensors.setdefault(shard.name, shard.tensor) != shard.tensor:
            raise ValueError(f"{shard.name}: {shard.tensor} on one rank, {tensors[shard.name]} on another")
    for name, count in values.items():
        if count != torch.Size(tensors[name].shape).numel():
            raise ValueError(f"{name}: {count} values for the shape {tensors[name].shape}")


@contextmanager
def _no_crc32() -> Iterator[None]:
    """Turn off the checksum of ``torch.save``, which nothing reads and which takes longer than the rest."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
