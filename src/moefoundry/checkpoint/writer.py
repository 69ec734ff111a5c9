"""Writes the files of a checkpoint, in the format of torch's distributed checkpoint (DCP), hashing what goes by.

DCP's own writer keeps the tensors of a file until it is complete and plans each save anew. Here tensors are written one
after another; which rank writes what is agreed once (:func:`make_plan`), as names and shapes never change in a run; and
every block that reaches a file has been hashed on the way (``manifest.py``).

    __{rank}_{n}.distcp     tensors, each as ``torch.save`` writes it
    .metadata               DCP's index: which part of which tensor is where
    state.json              all that is not a tensor
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moefoundry.checkpoint.format import METADATA_FILE
from moefoundry.checkpoint.manifest import BLOCK_BYTES, HashedBlock, Origin, commit, write_synced
from moefoundry.checkpoint.ranks import from_every_rank
from moefoundry.checkpoint.store import STATE_FILE
from moefoundry.config import UserError

_ALIGNMENT = 64  # torch aligns tensors within what it saves; with the start aligned too, mapped tensors are
_STEP_BYTES = 2**20  # hashed and then written while they are in the processor's cache


class TensorSpec(NamedTuple):
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Piece(NamedTuple):
    """A box of a tensor that a rank holds, without its values."""

    name: str
    whole: TensorSpec
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return TensorSpec(self.shape, self.whole.dtype).nbytes


Plan = Sequence[Sequence[Piece]]
"""What each rank writes, in this order."""


class Place(NamedTuple):
    """Where the bytes of a piece are."""

    file: str
    offset: int
    length: int


def data_file(rank: int, number: int = 0) -> str:
    """Name of a file of tensors."""
    return f"__{rank}_{number}.distcp"


class HashedFile:
    """A file of tensors, written from its first byte to its last.

    Attributes:
        blocks: What has been written, when it is closed.

    Raises:
        OSError: The disk is full, or fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks: list[HashedBlock] = []
        self.size = 0
        self._stream = path.open("wb", buffering=2 * _STEP_BYTES)
        self._hash = xxhash.xxh3_64()
        self._failure: OSError | None = None

    def append(self, values: Tensor) -> Place:
        """Write a tensor."""
        self.write(bytes(-self.size % _ALIGNMENT))
        self._end_block()
        offset = self.size
        values = values.detach().cpu()
        whole = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
        with _no_crc32():
            contiguous = values if whole else values.clone(memory_format=torch.contiguous_format)
            try:
                torch.save(contiguous, cast(IO[bytes], self))
            except RuntimeError as error:  # by which torch replaces what its stream raises
                raise self._failure or error from error
        return Place(self.path.name, offset, self.size - offset)

    def write(self, data: Any) -> int:
        """What ``torch.save`` calls."""
        view = memoryview(data).cast("B")
        position = 0
        while position < len(view):
            room = BLOCK_BYTES - (self.size - self._block_start)
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
                self._end_block()
        return len(view)

    def flush(self) -> None:
        """``torch.save`` calls it after each tensor, when nothing depends on it."""

    def close(self) -> None:
        """Everything is on the disk then."""
        self._end_block()
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def abort(self) -> None:
        """Close without a promise, after an error."""
        with suppress(OSError):
            self._stream.close()

    @property
    def _block_start(self) -> int:
        return self.blocks[-1].end if self.blocks else 0

    def _end_block(self) -> None:
        if self.size > self._block_start:
            start = self._block_start
            self.blocks.append(HashedBlock(start, self.size - start, self._hash.hexdigest()))
            self._hash.reset()


def local_pieces(tensors: Mapping[str, Tensor]) -> dict[Piece, Tensor]:
    """This rank's part of each tensor, sharing memory with it; nothing of a tensor that it holds nothing of."""
    pieces = {}
    for name, tensor in tensors.items():
        whole = TensorSpec(tuple(tensor.shape), tensor.dtype)
        shape, offsets, values = tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach()
        if isinstance(values, DTensor):
            shape, offsets = compute_local_shape_and_global_offset(tensor.shape, values.device_mesh, values.placements)
            values = values.to_local()
        if values.numel() or not tensor.numel():
            pieces[Piece(name, whole, tuple(offsets), tuple(shape))] = values
    return pieces


def make_plan(held: Sequence[Sequence[Piece]]) -> Plan:
    """Share the writing: each piece goes to that of the ranks that hold it which has the least to write so far.

    Args:
        held: What each rank holds.

    Raises:
        ValueError: The pieces of a tensor do not make it up, or ranks disagree on what it is.
    """
    owners: dict[Piece, list[int]] = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            owners.setdefault(piece, []).append(rank)
    _check_whole(owners)
    load = [0] * len(held)
    writer = {}
    for piece in sorted(owners, key=lambda piece: (-piece.nbytes, piece.name, piece.offsets)):
        writer[piece] = min(owners[piece], key=load.__getitem__)
        load[writer[piece]] += piece.nbytes
    return tuple(tuple(piece for piece in pieces if writer[piece] == rank) for rank, pieces in enumerate(held))


def write_pieces(path: Path, values: Sequence[Tensor]) -> tuple[list[Place], list[HashedBlock]]:
    """Write a rank's file; where each tensor is in it, and its blocks.

    Raises:
        OSError: The disk is full, or fails; what was written is removed.
    """
    file = HashedFile(path)
    try:
        places = [file.append(tensor) for tensor in values]
        file.close()
    except BaseException as error:
        file.abort()
        path.unlink()
        if isinstance(error, OSError):  # a failed write does not know its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return places, file.blocks


def write_index(
    directory: Path,
    places: Mapping[Piece, Place],
    blocks: Mapping[str, Sequence[HashedBlock]],
    state: Mapping[str, Any],
    origin: Origin,
) -> None:
    """Complete a checkpoint whose data files are there, and commit it.

    Args:
        directory: The staging directory.
        places: Where every piece of every tensor is.
        blocks: Of the data files.
        state: JSON document.
        origin: Where the checkpoint comes from.

    Raises:
        OSError: The disk is full, or fails.
        ValueError: The pieces of a tensor do not make it up.
    """
    entries: dict[str, TensorStorageMetadata] = {}
    for piece in places:
        empty = TensorStorageMetadata(TensorProperties(piece.whole.dtype), torch.Size(piece.whole.shape), [])
        chunks = entries.setdefault(piece.name, empty).chunks
        chunks.append(ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape)))
    _check_whole(places)
    metadata = Metadata(
        state_dict_metadata=dict(entries),
        storage_data={MetadataIndex(p.name, p.offsets): _StorageInfo(*place) for p, place in places.items()},
        storage_meta=StorageMeta(),
    )
    small = {
        METADATA_FILE: [write_synced(directory / METADATA_FILE, pickle.dumps(metadata))],
        STATE_FILE: [write_synced(directory / STATE_FILE, json.dumps(state, indent=1).encode())],
    }
    commit(directory, origin, {**blocks, **small})


@contextmanager
def together() -> Iterator[None]:
    """A part of a save that one rank or all do: an error that a rank meets in it is raised on every rank. A collective.

    Raises:
        UserError: A disk is full or fails, or a rank raised one.
    """
    cause: BaseException | None = None
    try:
        yield
    except Exception as error:
        cause = error
    first = next((each for each in from_every_rank(cause and describe(cause)) if each is not None), None)
    if first is not None:
        raise UserError(first) from cause


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Begin the message of any error with ``what``.

    Raises:
        UserError: In place of the error.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error in one line; of a file, the file first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _check_whole(pieces: Mapping[Piece, Any]) -> None:
    values: dict[str, int] = {}
    wholes: dict[str, TensorSpec] = {}
    for piece in pieces:
        values[piece.name] = values.get(piece.name, 0) + torch.Size(piece.shape).numel()
        if wholes.setdefault(piece.name, piece.whole) != piece.whole:
            raise ValueError(f"{piece.name}: {piece.whole} on one rank, {wholes[piece.name]} on another")
    for name, count in values.items():
        if count != torch.Size(wholes[name].shape).numel():
            raise ValueError(f"{name}: {count} values for the shape {wholes[name].shape}")


@contextmanager
def _no_crc32() -> Iterator[None]:
    """``torch.save`` without its own checksum, which nothing reads and which takes longer than the rest."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
