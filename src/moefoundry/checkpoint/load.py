"""Fill the tensors of every rank from a checkpoint of any mesh and world size; each byte leaves the store once.

A checkpoint is blocks: boxes of tensors, as the ranks held them that wrote it. Ranks that load have boxes of their own.
Every rank works out the same plan from the metadata, which rank 0 reads for all:

1. **Read.** Of copies of a tensor (the ``replicate`` axis, or plain tensors, which all ranks have) only the first is
   loaded from the store, and every file is read by one rank: the one among the first copies that needs most of it. It
   reads a block, checks its hashes, and sends the parts that others need to them. On the mesh of the checkpoint these
   are its own shards, and nothing is sent.
2. **Exchange.** Each rank of the first copy broadcasts its shard to its peers along ``replicate``, tensor by tensor.

Both go on at once: threads read a few blocks ahead (``reading.py``), and :data:`COPIES_UNDER_WAY` tensors are on their
way to the other copies. Where layout and dtype allow it, bytes go from the file into the memory of the parameter, and
from there into that of the same parameter on other ranks.

A file is read by one rank, though ranks could cut out of it what each needs, for three reasons: hashes cover whole
blocks, so parts would be read with their surroundings, more than once; columns of a block (an expert cut along its
rows) are scattered over all of it; and object stores hand out whole files. The price is that a checkpoint of fewer
files than there are ranks leaves the other ranks waiting. Beside the tensors themselves a rank holds one block in
memory, which is one rank's shard of one tensor, and its parts that are under way; where they cannot be read and
received in place, also the blocks ahead and the tensors under way.

Replica-aware loading: PyTorch blog, "Training MoEs at Scale with PyTorch" (2024).
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, lru_cache
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

from moefoundry.checkpoint.format import METADATA_FILE, parse_metadata, tensor_entries
from moefoundry.checkpoint.manifest import MANIFEST_FILE, Manifest
from moefoundry.checkpoint.ranks import from_every_rank, on_rank_zero, rank
from moefoundry.checkpoint.reading import BlockReader, Read, Wanted
from moefoundry.config import UserError
from moefoundry.config.errors import first_few

COPIES_UNDER_WAY = 2


@dataclass
class LoadReport:
    """What a load cost this rank.

    Attributes:
        tensor_bytes: Read from the store that are values of tensors.
        bytes_read: Read from the store altogether: tensors, what ``torch.save`` puts around them, and metadata.
        store_seconds: Waiting for what is read and checked, downloads included.
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
    with BlockReader(index.manifest) as reader, torch.no_grad():
        _Loader(index, report, reader).run(_targets(tensors, own or {}, owned))
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
        raise UserError(f"{index.directory} does not fit this model: {first_few(problems, '; ')}")


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

    def __init__(self, index: Index, report: LoadReport, reader: BlockReader) -> None:
        self._directory = index.directory
        self._metadata = index.metadata
        self._report = report
        self._reader = reader
        self._rank = rank()
        self._failure: UserError | None = None
        self._under_way: deque[tuple[dist.Work, Tensor, Tensor]] = deque()

    def run(self, targets: Iterator[Target]) -> None:
        plan = [(target, self._blocks(target)) for target in targets]
        readers = _choose_readers([block for _, blocks in plan for block in blocks])

        def reads(block: Block) -> bool:
            return readers[block.place.relative_path] == self._rank

        own = (self._wanted(target, block) for target, blocks in plan for block in blocks if reads(block))
        readings = self._reader.ahead(own)
        for target, blocks in plan:
            for block in blocks:
                if reads(block):
                    self._deliver(target, block, readings)
                elif mine := [part for part in block.parts if part.rank == self._rank]:
                    self._receive(target, mine[0], readers[block.place.relative_path])
            self._copy(target)
        self._land(0)
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

    def _wanted(self, target: Target, block: Block) -> Wanted:
        mine = Part(self._rank, block.box)
        into = self._part(target, mine) if mine in block.parts else None
        return Wanted(target.name, block.place, block.box.sizes, self._dtype(target), into)

    def _deliver(self, target: Target, block: Block, readings: Iterator[Future[Read]]) -> None:
        """Take from the next block read what this rank needs, and send the others theirs."""
        read = self._read(target, block, readings)
        start = time.perf_counter()
        sent: list[dist.P2POp] = []
        for part in block.parts:
            there = part.box.of(read.values, block.box)
            if part.rank != self._rank:
                sent.append(dist.P2POp(dist.isend, _on_wire(there), part.rank))
            elif (here := self._part(target, part)).data_ptr() != there.data_ptr():
                here.copy_(there)
        if sent:
            for work in dist.batch_isend_irecv(sent):
                work.wait()
        self._reader.release(read)
        self._report.exchange_seconds += time.perf_counter() - start

    def _receive(self, target: Target, part: Part, reader: int) -> None:
        """What this rank needs of a block that another reads."""
        start = time.perf_counter()
        here, dtype = self._part(target, part), self._dtype(target)
        fits = here.dtype == dtype and here.is_contiguous()
        wire = _on_wire(here if fits else torch.empty(here.shape, dtype=dtype, device=here.device))
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, wire, reader)]):
            work.wait()
        _off_wire(wire, here, dtype)
        self._report.exchange_seconds += time.perf_counter() - start

    def _part(self, target: Target, part: Part) -> Tensor:
        """A part that this rank needs, as a view of what is to be filled."""
        assert target.values is not None, "what has a box on this rank has values"
        return part.box.of(target.values, target.boxes[self._rank])

    def _copy(self, target: Target) -> None:
        """Begin to hand the first copy of a tensor on to the others."""
        if target.values is None or not target.values.numel():
            return
        for group in target.copies:
            if len(target.copies) > 1:
                self._land(0)  # what goes along the next axis is what this one has brought
            wire = _on_wire(target.values)
            work = dist.broadcast(wire, group=group, group_src=0, async_op=True)
            assert work is not None, "this rank is in the group"
            self._under_way.append((work, target.values, wire))
            self._land(COPIES_UNDER_WAY)

    def _land(self, limit: int) -> None:
        """Wait for the oldest broadcasts, until at most ``limit`` are under way."""
        start = time.perf_counter()
        while len(self._under_way) > limit:
            work, values, wire = self._under_way.popleft()
            work.wait()
            _off_wire(wire, values, values.dtype)
        self._report.exchange_seconds += time.perf_counter() - start

    def _dtype(self, target: Target) -> torch.dtype:
        """As it is stored."""
        return tensor_entries(self._metadata)[target.name].properties.dtype

    def _read(self, target: Target, block: Block, readings: Iterator[Future[Read]]) -> Read:
        """The next block. After a failure nothing more is read; what others wait for is zeros, and all learn of it at
        the end."""
        start = time.perf_counter()
        try:
            if self._failure is None:
                read = next(readings).result()
                self._report.bytes_read += read.nbytes
                self._report.tensor_bytes += block.box.numel * read.values.dtype.itemsize
                return read
        except UserError as error:
            self._failure = error
        except Exception as error:  # damaged files raise nearly anything
            path = self._directory / block.place.relative_path
            self._failure = UserError(f"{path}: unreadable checkpoint: tensor {target.name}: {error}")
        finally:
            self._report.store_seconds += time.perf_counter() - start
        return Read(torch.zeros((), dtype=self._dtype(target)).expand(block.box.sizes), memoryview(b""), 0)


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
    wire = values.contiguous().reshape(-1).view(torch.uint8)
    if "nccl" not in dist.get_backend():
        return wire.cpu()
    return wire if wire.is_cuda else wire.cuda()


def _off_wire(wire: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Put what has come, bytes of ``dtype``, into ``values``, unless it came straight into them."""
    if wire.data_ptr() != values.data_ptr():
        values.copy_(wire.view(dtype).view(values.shape))
