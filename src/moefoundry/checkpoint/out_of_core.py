"""Write and read a checkpoint a few rows at a time: no tensor is ever whole in memory.

Conversion reads single experts out of stacked tensors and writes them one by one. So here one process writes shards as
they are made, and files are mapped: only the pages that a read needs are loaded. The format is that of any other
checkpoint.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moefoundry.checkpoint.format import (
    METADATA_FILE,
    Box,
    FileRange,
    RangeReader,
    StoredTensor,
    TensorSpec,
    layout_in,
    read_metadata,
    stored_tensors,
    values_in,
)
from moefoundry.checkpoint.load_plan import plan_load
from moefoundry.checkpoint.manifest import Manifest, Origin, recipe_digest
from moefoundry.checkpoint.remote import local_file
from moefoundry.checkpoint.writer import HashedFile, Shard, WrittenFile, commit_files, data_file
from moefoundry.config import UserError

FILE_BYTES = 4 * 2**30
SHARD_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ShardValues:
    """Values of a shard of the tensor ``name``, from ``offsets`` on; shards of one tensor do not overlap."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor

    def box_of(self, tensor: Tensor) -> Tensor:
        """View the same box of another tensor of that shape."""
        return Box.at(self.offsets, self.values.shape).of(tensor, Box.whole(tensor.shape))


def row_ranges(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Cut a tensor of at least one dim into ranges of rows of at most :data:`SHARD_BYTES`, or of one row."""
    rows = max(1, SHARD_BYTES * spec.shape[0] // max(1, spec.nbytes))
    for start in range(0, spec.shape[0], rows):
        yield start, min(start + rows, spec.shape[0])


def write_shards(
    directory: Path, specs: Mapping[str, TensorSpec], shards: Iterable[ShardValues], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint into an existing, empty directory; one process does it all.

    Args:
        directory: The staging directory.
        specs: Every tensor of the checkpoint.
        shards: Values, in any order; each is asked for when the one before it is written.
        state: JSON document, written last.

    Raises:
        ValueError: A shard has another dtype than its tensor, or the shards of a tensor do not fill it.
    """
    plan: list[list[Shard]] = [[]]
    files: list[WrittenFile] = []
    file = HashedFile(directory / data_file(0))
    try:
        with progress(specs) as bar:
            for shard in shards:
                spec = specs[shard.name]
                if shard.values.dtype != spec.dtype:
                    raise ValueError(f"{shard.name}: a shard of {shard.values.dtype}, not {spec.dtype}")
                if file.size >= FILE_BYTES:
                    files.append(file.close())
                    file = HashedFile(directory / data_file(0, len(files)))
                    plan.append([])
                plan[-1].append(Shard(shard.name, spec, Box.at(shard.offsets, shard.values.shape)))
                file.append(shard.values)
                bar.update(shard.values.nbytes)
        files.append(file.close())
    except BaseException:
        file.abort()
        raise
    commit_files(directory, plan, files, state, Origin(recipe=recipe_digest(state["recipe"])))


def progress(specs: Mapping[str, TensorSpec]) -> tqdm:
    """Show a progress bar on a terminal, for all bytes of these tensors."""
    total = sum(spec.nbytes for spec in specs.values())
    return tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)


class ShardedTensors:
    """Tensors in the files of a distributed checkpoint, mapped into memory.

    Args:
        directory: The checkpoint.
        tensors: Where the shards of each tensor lie, by the tensor's name here.

    Attributes:
        specs: Shape and dtype of each tensor by name.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self._directory = directory
        self._tensors = tensors
        self.specs = {name: tensor.spec for name, tensor in tensors.items()}
        self._mapped = cache(self._map)

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """Read a new tensor: the whole, or the box of ``ranges`` of its leading dims.

        Raises:
            UserError: A file is missing or damaged, or does not hold all that is asked for.
        """
        limits = [*ranges, *((0, size) for size in self.specs[name].shape[len(ranges) :])]
        wanted = Box(tuple(start for start, _ in limits), tuple(stop for _, stop in limits))
        try:
            plan = plan_load({name: self._tensors[name]}, {name: {0: wanted}})
        except ValueError as error:
            raise UserError(f"{self._directory}: unreadable checkpoint: {error}") from error
        values = torch.empty(wanted.sizes, dtype=self.specs[name].dtype)
        for read in plan.tensors[0].reads:
            stored = self._shard(name, read.box, read.place)
            for need in read.needs:
                need.box.of(values, wanted).copy_(need.box.of(stored, read.box))
        return values

    def rows(self, name: str) -> Iterator[Tensor]:
        """Read the tensor, a range of rows at a time."""
        if not self.specs[name].shape:
            yield self.read(name)
            return
        for rows in row_ranges(self.specs[name]):
            yield self.read(name, rows)

    def _shard(self, name: str, box: Box, place: FileRange) -> Tensor:
        """Map the values of a stored shard, checked."""
        path = local_file(self._directory, place.file)
        try:
            self._check(name, place)
            with path.open("rb") as file:
                layout = layout_in(
                    RangeReader(file.fileno(), place.offset, place.length), box.sizes, self.specs[name].dtype
                )
            return values_in(self._mapped(path), place.offset, layout)
        except UserError:
            raise
        except Exception as error:  # damaged files raise nearly anything
            raise UserError(f"{path}: unreadable checkpoint: {error}") from error

    def _map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _check(self, name: str, place: FileRange) -> None:
        """Check the bytes of a shard, where the checkpoint tells what they are."""


class StoredTensors(ShardedTensors):
    """The tensors of a checkpoint of any mesh, checked as they are read.

    Args:
        directory: The checkpoint.
        prefix: Only tensors with this prefix are meant; names here are without it.
        stored_names: Name here -> whole name there, for tensors that have the values of another.

    Raises:
        UserError: The checkpoint is not committed, or its metadata cannot be read or is not what was saved.
    """

    def __init__(self, directory: Path, prefix: str = "", stored_names: Mapping[str, str] | None = None) -> None:
        stored, self._manifest = stored_tensors(read_metadata(directory)), Manifest.read(directory)
        self._manifest.check(METADATA_FILE, 0, self._manifest.size(METADATA_FILE))
        self._checked: set[FileRange] = set()
        self._stored_names = {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
        self._stored_names |= stored_names or {}
        super().__init__(
            directory, {name: stored[there] for name, there in self._stored_names.items() if there in stored}
        )

    def _check(self, name: str, place: FileRange) -> None:
        if place not in self._checked:  # by reading: of mapped memory, all of it would become resident
            self._manifest.check(*place, self._stored_names[name])
            self._checked.add(place)
