"""Write and read a checkpoint block by block: no tensor is ever whole in memory, whatever the model's size.

DCP's own writer keeps the tensors of a file until the file is complete, and its reader loads a whole chunk to copy a
slice of it. Conversion reads single experts out of stacked tensors and writes them one by one, so here blocks are
written as they are made, and files are mapped: what is read is the pages that a slice lies in. The format is DCP's,
read by ``io.read_into`` and written by ``io.write`` like any other checkpoint.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from tqdm import tqdm

from moefoundry.checkpoint.format import METADATA_FILE, FilePart, layout_in, read_metadata, values_in
from moefoundry.checkpoint.manifest import HashedBlock, Manifest, Origin, recipe_digest
from moefoundry.checkpoint.remote import local_file
from moefoundry.checkpoint.writer import HashedFile, Piece, Place, data_file, write_index
from moefoundry.checkpoint.writer import TensorSpec as TensorSpec
from moefoundry.config import UserError

FILE_BYTES = 4 * 2**30
BLOCK_BYTES = 16 * 2**20


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
    places: dict[Piece, Place] = {}
    with closing(_Files(directory)) as files, progress(specs) as bar:
        for block in blocks:
            if block.values.dtype != specs[block.name].dtype:
                raise ValueError(f"{block.name}: a block of {block.values.dtype}, not {specs[block.name].dtype}")
            piece = Piece(block.name, specs[block.name], tuple(block.offsets), tuple(block.values.shape))
            places[piece] = files.append(block.values)
            bar.update(block.values.nbytes)
    write_index(directory, places, files.blocks, state, Origin(recipe=recipe_digest(state["recipe"])))


def progress(specs: Mapping[str, TensorSpec]) -> tqdm:
    """A progress bar on a terminal, for all bytes of these tensors."""
    total = sum(spec.nbytes for spec in specs.values())
    return tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)


class _Files:
    """Data files of a checkpoint, each begun when the one before it is full.

    Attributes:
        blocks: Of the files that are closed, by name.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.blocks: dict[str, Sequence[HashedBlock]] = {}
        self._open()

    def append(self, values: Tensor) -> Place:
        """Write ``values``; where they are."""
        if self._file.size >= FILE_BYTES:
            self.close()
            self._open()
        return self._file.append(values)

    def close(self) -> None:
        self._file.close()
        self.blocks[self._file.path.name] = self._file.blocks

    def _open(self) -> None:
        self._file = HashedFile(self._directory / data_file(0, len(self.blocks)))


class StoredTensors:
    """The tensors of a checkpoint of any mesh, mapped into memory.

    Args:
        directory: The checkpoint.
        prefix: Of the tensors that are meant; names here are without it.
        stored_names: Of tensors that are another's values: name here -> the whole name there.

    Attributes:
        specs: What is there.

    Raises:
        UserError: The checkpoint is not committed, or its metadata cannot be read or is not what was saved.
    """

    def __init__(self, directory: Path, prefix: str = "", stored_names: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        metadata, self._manifest = read_metadata(directory), Manifest.read(directory)
        self._manifest.check(METADATA_FILE, 0, self._manifest.size(METADATA_FILE))
        self._checked: set[MetadataIndex] = set()
        stored = metadata.state_dict_metadata
        self._stored_names = {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
        self._stored_names |= stored_names or {}
        self._entries = {
            name: entry
            for name, there in self._stored_names.items()
            if isinstance(entry := stored.get(there), TensorStorageMetadata)
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
        parts: list[tuple[Tensor, tuple[slice, ...]]] = []
        for chunk in self._entries[name].chunks:
            first = [max(a, offset) for a, offset in zip(low, chunk.offsets, strict=True)]
            last = [min(b, offset + size) for b, offset, size in zip(high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            there = self._chunk(name, chunk)[_box(first, last, chunk.offsets)]
            parts.append((there, _box(first, last, low)))
        values = torch.empty([b - a for a, b in zip(low, high, strict=True)], dtype=self.specs[name].dtype)
        filled = 0
        for there, here in parts:
            values[here].copy_(there)
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
        index = MetadataIndex(self._stored_names[name], chunk.offsets)
        place = self._places[index]
        path = local_file(self._directory, place.relative_path)
        try:
            if index not in self._checked:  # by reading: of mapped memory, all of it would become resident
                self._manifest.check(place.relative_path, place.offset, place.length, index.fqn)
                self._checked.add(index)
            with path.open("rb") as file:
                part = FilePart(file.fileno(), place.offset, place.length)
                layout = layout_in(part, chunk.sizes, self.specs[name].dtype)
            return values_in(self._mapped(path), place.offset, layout)
        except UserError:
            raise
        except Exception as error:  # damaged files raise nearly anything
            raise UserError(f"{path}: unreadable checkpoint: {error}") from error

    def _map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _box(first: Iterable[int], last: Iterable[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(a - zero, b - zero) for a, b, zero in zip(first, last, origin, strict=True))
