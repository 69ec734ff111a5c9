"""Fill the tensors of every rank from a checkpoint of any mesh and world size; each byte leaves the store once.

Every rank makes the same plan (``load_plan.py``) from the index, which rank 0 reads for all:

1. **Read.** Of copies of a tensor (the ``replicate`` axis, or plain tensors, which all ranks have) only the first is
   loaded from the store, and every file is read by one rank: of the first copies' ranks, the one that needs most of it.
   It reads a shard, checks its hashes, and sends other ranks the boxes that they need. On the mesh that wrote the
   checkpoint these are its own shards, and nothing is sent.
2. **Exchange.** Each rank of the first copy broadcasts its shard to its peers along ``replicate``, tensor by tensor.

Both go on at once: threads read a few shards ahead (``reading.py``), and :data:`COPIES_UNDER_WAY` tensors are on their
way to the other copies. Where layout and dtype allow it, bytes go from the file into the memory of the parameter, and
from there into that of the same parameter on other ranks.

A file is read by one rank, for three reasons: hash ranges are read whole, columns of a shard are scattered over all of
it, and object stores hand out whole files. Beside the tensors a rank holds one stored shard in memory, and the boxes of
it that are being sent; where they cannot be read and received in place, also the shards ahead and the tensors on their
way.

Replica-aware loading: PyTorch blog, "Training MoEs at Scale with PyTorch" (2024).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moefoundry.checkpoint.format import METADATA_FILE, Box, StoredTensor, parse_metadata, stored_tensors
from moefoundry.checkpoint.load_plan import LoadPlan, Need, ShardRead, TensorLoad, first_copy, plan_load
from moefoundry.checkpoint.manifest import MANIFEST_FILE, Manifest
from moefoundry.checkpoint.ranks import from_every_rank, on_rank_zero, rank, together
from moefoundry.checkpoint.reading import Read, ShardReader, Wanted
from moefoundry.config import UserError
from moefoundry.config.errors import first_few

COPIES_UNDER_WAY = 2
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class LoadReport:
    """Cost of a load to this rank.

    Attributes:
        tensor_bytes: Bytes read from the store that are values of tensors.
        bytes_read: Bytes read from the store: tensors, what ``torch.save`` puts around them, and metadata.
        store_seconds: Time spent waiting for what is read and checked, downloads included.
        exchange_seconds: Time spent sending, receiving and waiting for other ranks.
    """

    tensor_bytes: int = 0
    bytes_read: int = 0
    store_seconds: float = 0.0
    exchange_seconds: float = 0.0


@dataclass(frozen=True)
class Index:
    """Content of a checkpoint, the same on every rank.

    Attributes:
        directory: The checkpoint.
        manifest: Hashes of its files.
        tensors: Tensors by name, and where their shards are.
        report: Cost of reading the index to this rank.
    """

    directory: Path
    manifest: Manifest
    tensors: Mapping[str, StoredTensor]
    report: LoadReport


def read_index(directory: Path) -> Index:
    """Read the index of a checkpoint on rank 0, for all; every rank calls it.

    Raises:
        UserError: The checkpoint is not committed, or its metadata are damaged or name anything but tensors.
    """
    report = LoadReport()
    start = time.perf_counter()
    manifest, tensors = on_rank_zero(lambda: _read_index(directory, report))
    report.exchange_seconds = time.perf_counter() - start - report.store_seconds
    return Index(directory, manifest, tensors, report)


def read_into(directory: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> LoadReport:
    """Call :func:`load` with the index of ``directory``."""
    return load(read_index(directory), tensors, own)


def load(index: Index, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> LoadReport:
    """Fill tensors in place; every rank calls it. Values are converted where dtypes differ.

    Args:
        index: From :func:`read_index`.
        tensors: Plain tensors and DTensors, under the same names and in the same order on every rank.
        own: Tensors that this rank alone asks for.

    Returns:
        Cost to this rank, with the reading of ``index``.

    Raises:
        UserError: A tensor is missing from the checkpoint, or has another shape there (nothing has been read then); or
            a file is missing or damaged, named with the tensor (some tensors have been overwritten then). Raised on
            every rank.
    """
    own, report = own or {}, replace(index.report)
    owned: list[Shapes] = from_every_rank({name: tuple(tensor.shape) for name, tensor in own.items()})
    _check_shapes(index, tensors, owned)
    try:
        plan = plan_load(index.tensors, _wanted_boxes(tensors, owned))
    except ValueError as error:
        raise UserError(f"{index.directory}: unreadable checkpoint: {error}") from error
    with ShardReader(index.manifest) as reader, torch.no_grad():
        _Loader(index.directory, plan, tensors, own, reader, report).run()
    return report


def _read_index(directory: Path, report: LoadReport) -> tuple[Manifest, Mapping[str, StoredTensor]]:
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
    return manifest, stored_tensors(metadata)


def _check_shapes(index: Index, tensors: Mapping[str, Tensor], owned: Sequence[Shapes]) -> None:
    stored = {name: tensor.spec.shape for name, tensor in index.tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for shapes in owned:
        wanted |= shapes
    problems = [
        f"{name}: " + (f"has shape {stored[name]} there, {shape} here" if name in stored else "missing")
        for name, shape in wanted.items()
        if stored.get(name) != shape
    ]
    if problems:
        raise UserError(f"{index.directory} does not fit this model: {first_few(problems, '; ')}")


def _wanted_boxes(tensors: Mapping[str, Tensor], owned: Sequence[Shapes]) -> dict[str, Mapping[int, Box]]:
    """Map each tensor to the boxes that are read of it: the first copy's, or those of the ranks that own it."""
    boxes_of = cache(lambda shape, mesh, placements: first_copy(shape, mesh.mesh, placements))  # layers are alike
    wanted: dict[str, Mapping[int, Box]] = {
        name: boxes_of(tensor.shape, tensor.device_mesh, tensor.placements)
        if isinstance(tensor, DTensor)
        else {0: Box.whole(tensor.shape)}
        for name, tensor in tensors.items()
    }
    for owner, shapes in enumerate(owned):
        for name, shape in shapes.items():
            wanted[name] = {**wanted.get(name, {}), owner: Box.whole(shape)}
    return wanted


class _Loader:
    """One load on one rank."""

    def __init__(
        self,
        directory: Path,
        plan: LoadPlan,
        tensors: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        reader: ShardReader,
        report: LoadReport,
    ) -> None:
        self._directory = directory
        self._plan = plan
        self._tensors = tensors
        self._values = {
            name: tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
            for name, tensor in {**tensors, **own}.items()
        }
        self._reader = reader
        self._report = report
        self._rank = rank()
        self._failure: UserError | None = None
        self._under_way: deque[tuple[dist.Work, Tensor, Tensor]] = deque()

    def run(self) -> None:
        """Read, send, receive and copy, tensor by tensor."""
        readers = self._plan.readers
        own = (
            self._request(tensor, read)
            for tensor in self._plan.tensors
            for read in tensor.reads
            if readers[read.place.file] == self._rank
        )
        readings = self._reader.ahead(own)
        for tensor in self._plan.tensors:
            for read in tensor.reads:
                reader = readers[read.place.file]
                if reader == self._rank:
                    self._deliver(tensor, read, readings)
                elif mine := [need for need in read.needs if need.rank == self._rank]:
                    self._receive(tensor, mine[0], reader)
            self._copy(tensor.name)
        self._finish_copies(0)
        with together():
            if self._failure is not None:
                raise self._failure

    def _request(self, tensor: TensorLoad, read: ShardRead) -> Wanted:
        mine = Need(self._rank, read.box)
        into = self._target(tensor, mine) if mine in read.needs else None
        return Wanted(tensor.name, read.place, read.box.sizes, tensor.dtype, into)

    def _deliver(self, tensor: TensorLoad, read: ShardRead, readings: Iterator[Future[Read]]) -> None:
        """Take from the next shard read what this rank needs, and send the others theirs."""
        done = self._read(tensor, read, readings)
        start = time.perf_counter()
        sent: list[dist.P2POp] = []
        for need in read.needs:
            there = need.box.of(done.values, read.box)
            if need.rank != self._rank:
                sent.append(dist.P2POp(dist.isend, _on_wire(there), need.rank))
            elif (here := self._target(tensor, need)).data_ptr() != there.data_ptr():
                here.copy_(there)
        if sent:
            for work in dist.batch_isend_irecv(sent):
                work.wait()
        self._reader.release(done)
        self._report.exchange_seconds += time.perf_counter() - start

    def _receive(self, tensor: TensorLoad, need: Need, reader: int) -> None:
        """Receive what this rank needs of a shard that another reads."""
        start = time.perf_counter()
        here = self._target(tensor, need)
        fits = here.dtype == tensor.dtype and here.is_contiguous()
        wire = _on_wire(here if fits else torch.empty(here.shape, dtype=tensor.dtype, device=here.device))
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, wire, reader)]):
            work.wait()
        _off_wire(wire, here, tensor.dtype)
        self._report.exchange_seconds += time.perf_counter() - start

    def _target(self, tensor: TensorLoad, need: Need) -> Tensor:
        """View the box that this rank needs, in the tensor that is to be filled."""
        return need.box.of(self._values[tensor.name], tensor.boxes[self._rank])

    def _copy(self, name: str) -> None:
        """Begin to hand the first copy of a tensor on to the others, along one axis after the other."""
        if name not in self._tensors or not (values := self._values[name]).numel():
            return
        groups = _groups_of_copies(self._tensors[name])
        for group in groups:
            if len(groups) > 1:
                self._finish_copies(0)  # what goes along the next axis is what this one has brought
            wire = _on_wire(values)
            work = dist.broadcast(wire, group=group, group_src=0, async_op=True)
            assert work is not None, "this rank is in the group"
            self._under_way.append((work, values, wire))
            self._finish_copies(COPIES_UNDER_WAY)

    def _finish_copies(self, limit: int) -> None:
        """Wait for the oldest broadcasts, until at most ``limit`` are under way."""
        start = time.perf_counter()
        while len(self._under_way) > limit:
            work, values, wire = self._under_way.popleft()
            work.wait()
            _off_wire(wire, values, values.dtype)
        self._report.exchange_seconds += time.perf_counter() - start

    def _read(self, tensor: TensorLoad, read: ShardRead, readings: Iterator[Future[Read]]) -> Read:
        """Take the next shard. After a failure nothing more is read: others get zeros, and learn of it at the end."""
        start = time.perf_counter()
        try:
            if self._failure is None:
                done = next(readings).result()
                self._report.bytes_read += done.nbytes
                self._report.tensor_bytes += read.box.numel * done.values.dtype.itemsize
                return done
        except UserError as error:
            self._failure = error
        except Exception as error:  # damaged files raise nearly anything
            path = self._directory / read.place.file
            self._failure = UserError(f"{path}: unreadable checkpoint: tensor {tensor.name}: {error}")
        finally:
            self._report.store_seconds += time.perf_counter() - start
        return Read(torch.zeros((), dtype=tensor.dtype).expand(read.box.sizes), memoryview(b""), 0)


def _groups_of_copies(tensor: Tensor) -> list[dist.ProcessGroup]:
    """List the groups of ranks along which the first copy is handed on; the first rank of each has it."""
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, enumerate(tensor.placements)
        return [mesh.get_group(dim) for dim, p in placements if p.is_replicate() and mesh.size(dim) > 1]
    return [dist.group.WORLD] if dist.is_initialized() and dist.group.WORLD is not None else []


def _on_wire(values: Tensor) -> Tensor:
    """Give the bytes of ``values``, uint8 [N], where the process group can send them; shared with it if possible."""
    wire = values.contiguous().reshape(-1).view(torch.uint8)
    if "nccl" not in dist.get_backend():
        return wire.cpu()
    return wire if wire.is_cuda else wire.cuda()


def _off_wire(wire: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Put the bytes that came, of ``dtype``, into ``values``, unless they came straight into it."""
    if wire.data_ptr() != values.data_ptr():
        values.copy_(wire.view(dtype).view(values.shape))
