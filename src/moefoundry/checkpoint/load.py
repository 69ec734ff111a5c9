"""Fill the tensors of every rank from a checkpoint of any mesh and world size; each byte leaves the store once.

A checkpoint is blocks: boxes of tensors, as the ranks held them that wrote it. Ranks that load have boxes of their own.
Every rank works out the same plan from the metadata, which rank 0 reads for all:

1. **Read.** Of copies of a tensor (the ``replicate`` axis, or plain tensors, which all ranks have) only the first is
   loaded from the store, and every file is read by one rank: the one among the first copies that needs most of it. It
   reads a block, checks its hashes, and sends the parts that others need to them. On the mesh of the checkpoint these
   are its own shards, and nothing is sent.
2. **Exchange.** Each rank of the first copy broadcasts its shard to its peers along ``replicate``, tensor by tensor.

A file is read by one rank, though ranks could cut out of it what each needs, for three reasons: hashes cover whole
blocks, so parts would be read with their surroundings, more than once; columns of a block (an expert cut along its
rows) are scattered over all of it; and object stores hand out whole files. The price is that a checkpoint of fewer
files than there are ranks leaves the other ranks waiting. Beside the tensors themselves a rank holds one block in
memory, which is one rank's shard of one tensor, and its parts that are under way.

Replica-aware loading: PyTorch blog, "Training MoEs at Scale with PyTorch" (2024).
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from io import FileIO
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from xxhash import xxh3_64

from moefoundry.checkpoint.format import (
    METADATA_FILE,
    FilePart,
    layout_in,
    parse_metadata,
    tensor_entries,
    values_in,
    values_offset,
)
from moefoundry.checkpoint.manifest import MANIFEST_FILE, Manifest
from moefoundry.checkpoint.ranks import from_every_rank, on_rank_zero, rank
from moefoundry.checkpoint.remote import local_file
from moefoundry.config import UserError

NAMED_PROBLEMS = 8
STEP_BYTES = 2**20  # hashed while they are in the processor's cache


@dataclass
class LoadReport:
    """What a load cost this rank.

    Attributes:
        tensor_bytes: Read from the store that are values of tensors.
        bytes_read: Read from the store altogether: tensors, what ``torch.save`` puts around them, and metadata.
        store_seconds: Reading and checking, downloads included.
        exchange_seconds: Sending, receiving and waiting for other ranks.
    """

    tensor_bytes: int = 0
    bytes_read: int = 0
    store_seconds: float = 0.0
    exchange_seconds: float = 0.0


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds and where, the same on every rank.

    Attributes:
        directory: The checkpoint.
        manifest: Hashes of its files.
        metadata: DCP's.
        report: What reading it cost this rank.
    """

    directory: Path
    manifest: Manifest
    metadata: Metadata
    report: LoadReport

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and full shape of every tensor."""
        return {name: tuple(entry.size) for name, entry in tensor_entries(self.metadata).items()}


class Box(NamedTuple):
    """A part of a tensor: indices from ``first`` on and below ``last``, in each dim."""

    first: tuple[int, ...]
    last: tuple[int, ...]

    @classmethod
    def at(cls, offsets: Sequence[int], sizes: Sequence[int]) -> Box:
        return cls(tuple(offsets), tuple(a + size for a, size in zip(offsets, sizes, strict=True)))

    @property
    def sizes(self) -> torch.Size:
        return torch.Size([b - a for a, b in zip(self.first, self.last, strict=True)])

    @property
    def numel(self) -> int:
        return self.sizes.numel()

    def of(self, values: Tensor, outer: Box) -> Tensor:
        """This part as a view of ``values``, which are those of ``outer``."""
        return values[tuple(slice(a - o, b - o) for a, b, o in zip(self.first, self.last, outer.first, strict=True))]


class Part(NamedTuple):
    """What one rank needs of a block."""

    rank: int
    box: Box


@dataclass(frozen=True)
class Block:
    """A part of a tensor as it is stored, and who needs what of it."""

    box: Box
    place: _StorageInfo
    parts: list[Part]


@dataclass(frozen=True)
class Target:
    """A tensor to fill.

    Attributes:
        name: In the checkpoint.
        values: What this rank has of it; None where it has nothing to do with it.
        boxes: What each rank of the first copy needs.
        copies: Groups of ranks along which the first copy is handed on; their first rank has it.
    """

    name: str
    values: Tensor | None
    boxes: Mapping[int, Box]
    copies: Sequence[dist.ProcessGroup]


def read_index(directory: Path) -> Index:
    """Rank 0 reads it for all; every rank calls it.

    Raises:
        UserError: The checkpoint is not committed, or its metadata are damaged or name anything but tensors.
    """
    report = LoadReport()
    start = time.perf_counter()
    manifest, metadata = on_rank_zero(lambda: _read_index(directory, report))
    report.exchange_seconds = time.perf_counter() - start - report.store_seconds
    return Index(directory, manifest, metadata, report)


def load(index: Index, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> LoadReport:
    """Fill tensors in place; every rank calls it. Values are converted where dtypes differ.

    Args:
        index: From :func:`read_index`.
        tensors: Plain tensors and DTensors, under the same names and in the same order on every rank.
        own: Tensors that this rank alone asks for.

    Returns:
        What it cost this rank, with the reading of ``index``.

    Raises:
        UserError: A tensor is missing from the checkpoint, or has another shape there (nothing has been read then); or
            a file is missing or damaged, named with the tensor (some tensors have been overwritten then). Raised on
            every rank.
    """
    report = replace(index.report)
    owned = from_every_rank({name: tuple(tensor.shape) for name, tensor in (own or {}).items()})
    _check_shapes(index, tensors, owned)
    with ExitStack() as files, torch.no_grad():
        _Loader(index, report, files).run(_targets(tensors, own or {}, owned))
    return report


def _read_index(directory: Path, report: LoadReport) -> tuple[Manifest, Metadata]:
    start = time.perf_counter()
    manifest = Manifest.read(directory)
    path = directory / METADATA_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: unreadable checkpoint metadata: {error}") from error
    metadata = parse_metadata(path, content)
    manifest.verify(METADATA_FILE, 0, content)
    report.bytes_read += len(content) + (directory / MANIFEST_FILE).stat().st_size
    report.store_seconds += time.perf_counter() - start
    return manifest, metadata


def _check_shapes(index: Index, tensors: Mapping[str, Tensor], owned: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    stored = index.shapes
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for names in owned:
        wanted |= names
    problems = [
        f"{name}: " + (f"has shape {stored[name]} there, {shape} here" if name in stored else "missing")
        for name, shape in wanted.items()
        if stored.get(name) != shape
    ]
    if problems:
        raise UserError(f"{index.directory} does not fit this model: " + "; ".join(problems[:NAMED_PROBLEMS]))


def _targets(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], owned: Sequence[Mapping[str, tuple[int, ...]]]
) -> Iterator[Target]:
    world = [dist.group.WORLD] if dist.is_initialized() and dist.group.WORLD is not None else []
    boxes_of = cache(_first_copy)  # layers are alike
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            boxes = boxes_of(tensor.shape, mesh, placements)
            copied = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
            groups = [mesh.get_group(dim) for dim in copied if mesh.size(dim) > 1]
            yield Target(name, tensor.to_local(), boxes, groups)
        else:
            yield Target(name, tensor.detach(), {0: _whole(tensor.shape)}, world)
    for owner, shapes in enumerate(owned):
        for name, shape in shapes.items():
            yield Target(name, own.get(name), {owner: _whole(shape)}, [])


def _whole(shape: Sequence[int]) -> Box:
    return Box.at([0] * len(shape), shape)


def _first_copy(shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> dict[int, Box]:
    """Rank -> its box, of the ranks that come first along every axis on which the tensor is copied."""
    ranges = [
        range(1 if placement.is_replicate() else size) for size, placement in zip(mesh.shape, placements, strict=True)
    ]
    boxes, ranks = {}, mesh.mesh
    for coordinate in product(*ranges):
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh.shape, list(coordinate), placements)
        boxes[int(ranks[coordinate])] = Box.at(offsets, sizes)
    return boxes


@lru_cache(maxsize=256)
def _overlaps(blocks: tuple[Box, ...], boxes: tuple[tuple[int, Box], ...]) -> list[list[Part]]:
    """For each block, what each rank needs of it. Layers have the same shapes, so that most answers are known."""
    ranks = [rank for rank, _ in boxes]
    there, here = np.array(blocks, np.int64), np.array([box for _, box in boxes], np.int64)
    first = np.maximum(there[:, None, 0], here[None, :, 0])
    last = np.minimum(there[:, None, 1], here[None, :, 1])
    parts: list[list[Part]] = [[] for _ in blocks]
    for block, box in np.argwhere((first < last).all(-1)).tolist():
        parts[block].append(Part(ranks[box], Box(tuple(first[block, box].tolist()), tuple(last[block, box].tolist()))))
    return parts


class _Loader:
    """One load on one rank."""

    def __init__(self, index: Index, report: LoadReport, files: ExitStack) -> None:
        self._directory = index.directory
        self._manifest = index.manifest
        self._metadata = index.metadata
        self._report = report
        self._files = files
        self._rank = rank()
        self._failure: UserError | None = None
        self._memory = memoryview(b"")
        self._open = cache(self._open_file)

    def run(self, targets: Iterator[Target]) -> None:
        plan = [(target, self._blocks(target)) for target in targets]
        readers = _choose_readers([block for _, blocks in plan for block in blocks])
        for target, blocks in plan:
            for block in blocks:
                reader = readers[block.place.relative_path]
                if self._rank == reader or any(part.rank == self._rank for part in block.parts):
                    self._deliver(target, block, reader)
            self._copy(target)
        failures = [failure for failure in from_every_rank(self._failure) if failure is not None]
        if failures:
            raise failures[0]

    def _blocks(self, target: Target) -> list[Block]:
        """The blocks of a tensor that anyone needs.

        Raises:
            UserError: They do not make up what is needed.
        """
        chunks: list[ChunkStorageMetadata] = tensor_entries(self._metadata)[target.name].chunks
        boxes = [Box.at(chunk.offsets, chunk.sizes) for chunk in chunks]
        places: dict[MetadataIndex, _StorageInfo] = self._metadata.storage_data
        parts = _overlaps(tuple(boxes), tuple(target.boxes.items())) if boxes else []
        blocks = [
            Block(box, places[index], needed)
            for box, needed in zip(boxes, parts, strict=True)
            if needed and (index := MetadataIndex(target.name, torch.Size(box.first))) in places
        ]
        found = sum(part.box.numel for block in blocks for part in block.parts)
        if found != sum(box.numel for box in target.boxes.values()):
            raise UserError(f"{self._directory}: unreadable checkpoint: a part of {target.name} is in no file")
        return blocks

    def _deliver(self, target: Target, block: Block, reader: int) -> None:
        """Read a block if that is this rank's part; take from it what this rank needs, and send the others theirs."""
        values = self._read(target, block) if self._rank == reader else None
        start = time.perf_counter()
        sent: list[dist.P2POp] = []
        received: list[tuple[Tensor, Tensor]] = []
        dtype = tensor_entries(self._metadata)[target.name].properties.dtype
        for part in block.parts:
            if values is not None and part.rank != self._rank:
                sent.append(dist.P2POp(dist.isend, _on_wire(part.box.of(values, block.box)), part.rank))
            elif part.rank == self._rank:
                assert target.values is not None, "what has a box on this rank has values"
                here = part.box.of(target.values, target.boxes[self._rank])
                if values is not None and values.data_ptr() != here.data_ptr():
                    here.copy_(part.box.of(values, block.box))
                elif values is not None:
                    continue  # it was read into place
                else:
                    wire = torch.empty(part.box.numel * dtype.itemsize, dtype=torch.uint8, device=_wire_device())
                    sent.append(dist.P2POp(dist.irecv, wire, reader))
                    received.append((here, wire))
        if sent:
            for work in dist.batch_isend_irecv(sent):
                work.wait()
        for here, wire in received:
            here.copy_(wire.view(dtype).view(here.shape))
        self._report.exchange_seconds += time.perf_counter() - start

    def _copy(self, target: Target) -> None:
        """Hand the first copy of a tensor on to the others."""
        if target.values is None or not target.values.numel() or not target.copies:
            return
        start = time.perf_counter()
        wire = _on_wire(target.values)
        for group in target.copies:
            dist.broadcast(wire, group=group, group_src=0)
        if wire.data_ptr() != target.values.data_ptr():
            target.values.copy_(wire.view(target.values.dtype).view(target.values.shape))
        self._report.exchange_seconds += time.perf_counter() - start

    def _read(self, target: Target, block: Block) -> Tensor:
        """A block, checked; it is valid until the next one is read. After a failure, zeros: other ranks wait for what
        this one has to send, and all learn of the failure at the end."""
        dtype = tensor_entries(self._metadata)[target.name].properties.dtype
        start = time.perf_counter()
        if self._failure is None:
            try:
                return self._read_block(target, block, dtype)
            except UserError as error:
                self._failure = error
            except Exception as error:  # damaged files raise nearly anything
                path = self._directory / block.place.relative_path
                self._failure = UserError(f"{path}: unreadable checkpoint: tensor {target.name}: {error}")
            finally:
                self._report.store_seconds += time.perf_counter() - start
        return torch.zeros((), dtype=dtype).expand(block.box.sizes)

    def _read_block(self, target: Target, block: Block, dtype: torch.dtype) -> Tensor:
        place, file = block.place, block.place.relative_path
        offset, length = self._manifest.covering(file, place.offset, place.length)
        stream = self._open(file)
        part = FilePart(stream.fileno(), place.offset, place.length)
        layout = layout_in(part, block.box.sizes, dtype)
        if (here := self._same_memory(target, block, layout)) is None:
            memory = self._scratch(length)
            self._fill(stream, offset, [memory], target.name)
            values = values_in(memory, place.offset - offset, layout)
        else:
            before = place.offset - offset + values_offset(layout)
            around = self._scratch(length - here.nbytes)
            inside = memoryview(here.reshape(-1).view(torch.uint8).numpy().data)
            self._fill(stream, offset, [around[:before], inside, around[before:]], target.name)
            values = here
        self._report.bytes_read += length + part.bytes_read
        self._report.tensor_bytes += block.box.numel * dtype.itemsize
        return values

    def _same_memory(self, target: Target, block: Block, layout: Tensor) -> Tensor | None:
        """The part of this rank's tensor that a block is, if its bytes can be read straight into it."""
        box = target.boxes.get(self._rank)
        if target.values is None or box is None or Part(self._rank, block.box) not in block.parts:
            return None
        here = block.box.of(target.values, box)
        same = here.dtype == layout.dtype and not here.is_cuda and here.is_contiguous() and layout.is_contiguous()
        return here if same and layout.untyped_storage().nbytes() == here.nbytes else None

    def _fill(self, stream: FileIO, offset: int, memories: Sequence[memoryview], name: str) -> None:
        """Read bytes that follow each other and check them on the way, while they are in the processor's cache.

        Raises:
            UserError: They are not what was saved.
        """
        file, end = Path(str(stream.name)).name, offset + sum(len(memory) for memory in memories)
        hashes = self._manifest.files[file]
        number, hashed = bisect_left(hashes, offset, key=lambda block: block.offset), xxh3_64()
        for memory in memories:
            position = 0
            while position < len(memory):
                step = min(STEP_BYTES, len(memory) - position, hashes[number].end - offset)
                count = os.preadv(stream.fileno(), [memory[position : position + step]], offset)
                place = f"{self._directory / file}: offset {offset}, tensor {name}"
                if not count:
                    raise UserError(f"{place}: the file ends there, not at {end} or later")
                hashed.update(memory[position : position + count])
                position, offset = position + count, offset + count
                if offset == hashes[number].end:
                    start, length, digest = hashes[number]
                    if hashed.hexdigest() != digest:
                        raise UserError(
                            f"{place}: damaged: the {length} bytes from {start} on differ from what was saved"
                        )
                    number, hashed = number + 1, xxh3_64()

    def _scratch(self, length: int) -> memoryview:
        if len(self._memory) < length:
            self._memory = memoryview(bytearray(length))
        return self._memory[:length]

    def _open_file(self, name: str) -> FileIO:
        return self._files.enter_context(local_file(self._directory, name).open("rb", buffering=0))


def _choose_readers(blocks: Sequence[Block]) -> dict[str, int]:
    """File -> the rank that reads it: who needs most of it; of several, who has least to read."""
    needs: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for block in blocks:
        for part in block.parts:
            needs[block.place.relative_path][part.rank] += part.box.numel
    readers: dict[str, int] = {}
    load: dict[int, int] = defaultdict(int)
    for file, ranks in sorted(needs.items()):
        most = max(ranks.values())
        reader = min((rank for rank, need in ranks.items() if need == most), key=lambda rank: (load[rank], rank))
        load[reader] += sum(ranks.values())
        readers[file] = reader
    return readers


def _on_wire(values: Tensor) -> Tensor:
    """The bytes of ``values``, 1-D, where the process group can send them; shared with it if they can be."""
    return values.contiguous().reshape(-1).view(torch.uint8).to(_wire_device(values.device))


def _wire_device(near: torch.device | None = None) -> torch.device:
    """Where tensors have to be to be sent."""
    if "nccl" in dist.get_backend():
        return near if near is not None and near.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
