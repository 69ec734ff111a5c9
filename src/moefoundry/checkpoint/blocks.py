"""Write and read a checkpoint block by block: no tensor is ever whole in memory, whatever the model's size.

DCP's own writer keeps the tensors of a file until the file is complete, and its reader loads a whole chunk to copy a
slice of it. Conversion reads single experts out of stacked tensors and writes them one by one, so here blocks are
written as they are made, and files are mapped: what is read is the pages that a slice lies in. The format is DCP's,
read by ``io.read_into`` and written by ``io.write`` like any other checkpoint.
"""

from __future__ import annotations

import json
import mmap
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
from tqdm import tqdm

from moefoundry.checkpoint.io import METADATA_FILE, read_metadata, slice_reader
from moefoundry.checkpoint.store import STATE_FILE
from moefoundry.config import UserError

FILE_BYTES = 4 * 2**30
BLOCK_BYTES = 16 * 2**20
_ALIGNMENT = 64  # torch aligns tensors within what it saves; with the start aligned too, mapped tensors are


class TensorSpec(NamedTuple):
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Values of the tensor ``name`` from ``offsets`` on; blocks of one tensor do not overlap."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor

    def box_of(self, tensor: Tensor) -> Tensor:
        """The part of the whole tensor that this block is, as a view."""
        box = tuple(slice(first, first + size) for first, size in zip(self.offsets, self.values.shape, strict=True))
        return tensor[box]


def row_ranges(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most :data:`BLOCK_BYTES`, or of one row, that make up a tensor of at least one dim."""
    rows = max(1, BLOCK_BYTES * spec.shape[0] // max(1, spec.nbytes))
    for start in range(0, spec.shape[0], rows):
        yield start, min(start + rows, spec.shape[0])


def write_blocks(
    directory: Path, specs: Mapping[str, TensorSpec], blocks: Iterable[Block], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint into an existing, empty directory; one process does it all.

    Args:
        directory: The staging directory.
        specs: Every tensor of the checkpoint.
        blocks: What they hold, in any order; each is asked for when the one before it is written.
        state: JSON document, written last.

    Raises:
        ValueError: A block has another dtype than its tensor, or the blocks of a tensor do not fill it.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in specs}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with closing(_Files(directory)) as files, progress(specs) as bar:
        for block in blocks:
            if block.values.dtype != specs[block.name].dtype:
                raise ValueError(f"{block.name}: a block of {block.values.dtype}, not {specs[block.name].dtype}")
            places[MetadataIndex(block.name, block.offsets)] = files.append(block.values)
            chunks[block.name].append(ChunkStorageMetadata(torch.Size(block.offsets), block.values.shape))
            bar.update(block.values.nbytes)
    for name, spec in specs.items():
        written = sum(chunk.sizes.numel() for chunk in chunks[name])
        if written != torch.Size(spec.shape).numel():
            raise ValueError(f"{name}: {written} values for the shape {spec.shape}")
    metadata = Metadata(
        state_dict_metadata={
            name: TensorStorageMetadata(TensorProperties(spec.dtype), torch.Size(spec.shape), chunks[name])
            for name, spec in specs.items()
        },
        storage_data=places,
        storage_meta=StorageMeta(),
    )
    (directory / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    (directory / STATE_FILE).write_text(json.dumps(state, indent=1))


def progress(specs: Mapping[str, TensorSpec]) -> tqdm:
    """A progress bar on a terminal, for all bytes of these tensors."""
    total = sum(spec.nbytes for spec in specs.values())
    return tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)


class _Files:
    """Data files of a checkpoint, each begun when the one before it is full."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._open()

    def append(self, values: Tensor) -> _StorageInfo:
        """Write ``values``; where they are."""
        if self._stream.tell() >= FILE_BYTES:
            self.close()
            self._open()
        self._stream.write(bytes(-self._stream.tell() % _ALIGNMENT))
        offset = self._stream.tell()
        whole = values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
        torch.save(values if whole else values.clone(memory_format=torch.contiguous_format), self._stream)
        return _StorageInfo(self._name, offset, self._stream.tell() - offset)

    def close(self) -> None:
        self._stream.close()

    def _open(self) -> None:
        self._name = f"__0_{self._count}.distcp"
        self._stream = (self._directory / self._name).open("wb")
        self._count += 1


class StoredTensors:
    """The tensors of a checkpoint of any mesh, mapped into memory.

    Args:
        directory: The checkpoint.
        prefix: Of the tensors that are meant; names here are without it.

    Attributes:
        specs: What is there.

    Raises:
        UserError: The metadata cannot be read.
    """

    def __init__(self, directory: Path, prefix: str = "") -> None:
        self._directory = directory
        self._prefix = prefix
        metadata = read_metadata(directory)
        self._entries = {
            name.removeprefix(prefix): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.specs = {
            name: TensorSpec(tuple(entry.size), entry.properties.dtype) for name, entry in self._entries.items()
        }
        self._mapped = cache(self._map)

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """A new tensor: the whole, or the part in ``ranges`` of its leading dims.

        Raises:
            UserError: A file is missing or damaged, or does not hold all that is asked for.
        """
        limits = [*ranges, *((0, size) for size in self.specs[name].shape[len(ranges) :])]
        low, high = [start for start, _ in limits], [stop for _, stop in limits]
        values = torch.empty([b - a for a, b in zip(low, high, strict=True)], dtype=self.specs[name].dtype)
        filled = 0
        for chunk in self._entries[name].chunks:
            first = [max(a, offset) for a, offset in zip(low, chunk.offsets, strict=True)]
            last = [min(b, offset + size) for b, offset, size in zip(high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            there = self._chunk(name, chunk)[_box(first, last, chunk.offsets)]
            values[_box(first, last, low)].copy_(there)
            filled += there.numel()
        if filled != values.numel():
            raise UserError(f"{self._directory}: unreadable checkpoint: a part of {name} is in no file")
        return values

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor, cut into rows."""
        if not self.specs[name].shape:
            yield self.read(name)
            return
        for rows in row_ranges(self.specs[name]):
            yield self.read(name, rows)

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(self._prefix + name, chunk.offsets)]
        path = self._directory / place.relative_path
        try:
            with path.open("rb") as file:
                layout = torch.load(slice_reader(self._directory, file, place), map_location="meta", weights_only=True)
            if (layout.shape, layout.dtype) != (chunk.sizes, self.specs[name].dtype):
                raise ValueError(f"holds {layout.dtype} {tuple(layout.shape)} for {name}")
            offset = place.offset + layout.untyped_storage()._checkpoint_offset
            count = layout.untyped_storage().nbytes() // layout.dtype.itemsize
            values = torch.frombuffer(self._mapped(path), dtype=layout.dtype, count=count, offset=offset)
            return values.as_strided(layout.shape, layout.stride(), layout.storage_offset())
        except Exception as error:  # damaged files raise nearly anything
            raise UserError(f"{path}: unreadable checkpoint: {error}") from error

    def _map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _box(first: Iterable[int], last: Iterable[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(a - zero, b - zero) for a, b, zero in zip(first, last, origin, strict=True))
