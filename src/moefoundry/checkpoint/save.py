"""Save checkpoints of all ranks, one after another, in the background if that is wanted.

A save has four parts:

    agree     on who writes which shards, by a collective; the answer is kept for the next save
    stage     each rank copies its shards into CPU buffers, which are kept, too (in the background only)
    write     each rank writes its file
    commit    rank 0, when all files are there: index, manifest, marker, final name

In the background training stands still for the first two parts. A thread of each rank writes, leaves a note about its
file, ``.part-{rank}.json``, beside it, and the thread of rank 0 commits when it has seen every rank's note. So the
threads talk through the directory that they write to and never through a process group: they can neither deadlock nor
reorder the collectives of training. All ranks agree in :meth:`Saver.finish`, which each save begins with, whether the
save before it has failed: at most one is under way.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moefoundry.checkpoint.format import Box, FileRange, TensorSpec
from moefoundry.checkpoint.manifest import HashRange, Origin
from moefoundry.checkpoint.ranks import describe, from_every_rank, rank, saying, together
from moefoundry.checkpoint.remote import upload_checkpoint
from moefoundry.checkpoint.store import CheckpointStore, Retention
from moefoundry.checkpoint.writer import SavePlan, Shard, WrittenFile, check_whole, commit_files, data_file, write_file
from moefoundry.config import UserError

_COPYING_THREADS = 4
_POLL_SECONDS = 0.02
_CLOSE_SECONDS = 30.0


def local_shards(tensors: Mapping[str, Tensor]) -> dict[Shard, Tensor]:
    """Map this rank's shard of each tensor to its values, which share memory with the tensor.

    A rank that holds nothing of a tensor has no shard of it.
    """
    shards = {}
    for name, tensor in tensors.items():
        box, values = Box.whole(tensor.shape), tensor.detach()
        if isinstance(values, DTensor):
            box = Box.at(
                *reversed(compute_local_shape_and_global_offset(tensor.shape, values.device_mesh, values.placements))
            )
            values = values.to_local()
        if values.numel() or not tensor.numel():
            shards[Shard(name, TensorSpec(tuple(tensor.shape), tensor.dtype), box)] = values
    return shards


def plan_save(held: Sequence[Sequence[Shard]]) -> SavePlan:
    """Share the writing: of the ranks that hold a shard, the one with the least to write so far writes it.

    Args:
        held: Shards of each rank.

    Raises:
        ValueError: The shards of a tensor do not make it up, or ranks disagree on its shape or dtype.
    """
    owners: dict[Shard, list[int]] = {}
    for owner, shards in enumerate(held):
        for shard in shards:
            owners.setdefault(shard, []).append(owner)
    check_whole(owners)
    load = [0] * len(held)
    writer = {}
    for shard in sorted(owners, key=lambda shard: (-shard.nbytes, shard.name, shard.box.first)):
        writer[shard] = min(owners[shard], key=load.__getitem__)
        load[writer[shard]] += shard.nbytes
    return tuple(tuple(shard for shard in shards if writer[shard] == owner) for owner, shards in enumerate(held))


def write(
    directory: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], origin: Origin | None = None
) -> None:
    """Write and commit a checkpoint in an existing, empty directory; every rank calls it.

    Args:
        directory: The staging directory, on storage that all ranks share.
        tensors: This rank's tensors, with shards as DTensors; a name that several ranks give is the same tensor.
        state: JSON document, the same on every rank.
        origin: Origin of the checkpoint.

    Raises:
        UserError: A disk is full or fails.
        ValueError: The shards of a tensor do not make it up.
    """
    held = local_shards(tensors)
    plan = plan_save(from_every_rank(list(held)))
    with together("cannot write"):
        written = write_file(directory / data_file(rank()), [held[shard] for shard in plan[rank()]])
    files = from_every_rank(written)
    with together("cannot write"):
        if rank() == 0:
            commit_files(directory, plan, files, state, origin or Origin(world_size=len(plan)))


class Saver:
    """Saves checkpoints into ``store``, one after another; every rank has one and calls the same methods.

    Args:
        store: Directory of the checkpoints, on storage that all ranks share.
        published: Called on rank 0 when a checkpoint has its final name, in the thread that writes. Its errors are
            raised as those of the save are, and say by themselves what failed: the checkpoint is there.
    """

    def __init__(self, store: CheckpointStore, published: Callable[[Path], None]) -> None:
        self.store = store
        self._published = published
        self._held: Sequence[Shard] = ()
        self._plan: SavePlan = ()
        self._buffers: dict[Shard, Tensor] = {}
        self._under_way: _BackgroundSave | None = None

    @property
    def is_writing(self) -> bool:
        """True while this rank's thread works on the last save."""
        return self._under_way is not None and self._under_way.thread.is_alive()

    def start(self, batch: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], origin: Origin) -> None:
        """Begin a save (see :func:`write`) and return once the tensors may change again.

        Raises:
            UserError: The batch has a checkpoint already, or the save before this one failed.
        """
        self._begin(batch)
        held = local_shards(tensors)
        if any(from_every_rank(list(held) != self._held)):
            self._held, self._plan, self._buffers = list(held), plan_save(from_every_rank(list(held))), {}
        values = self._staged({shard: held[shard] for shard in self._plan[rank()]})
        self._under_way = _BackgroundSave(self.store, self._published, batch, self._plan, values, state, origin)

    def save(self, batch: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], origin: Origin) -> None:
        """Save and return when the checkpoint is published; nothing is copied, and no thread has a part in it.

        Raises:
            UserError: As :meth:`start`; or this save failed, and nothing of it is left; or what follows it did.
        """
        self._begin(batch)
        try:
            with together(f"checkpoint ba{batch} was not saved"):
                write(self.store.staging_path(batch), tensors, state, origin)
                if rank() == 0:
                    self.store.publish(batch)
        except UserError:
            self._discard(batch)
            raise
        with together():
            if rank() == 0:
                self._published(self.store.path(batch))

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one.

        Raises:
            UserError: It failed, on any rank; nothing of it is left, and what was saved before is untouched. Or what
                follows it did (``published``).
        """
        if self._under_way is None:
            return
        save, self._under_way = self._under_way, None
        try:
            with together():
                save.written.wait()
                save.check()
            with together():  # all notes are there: rank 0 does commit
                save.thread.join()
                save.check()
        except UserError:
            save.abandoned.set()
            save.thread.join()
            self._discard(save.batch)
            raise

    def close(self) -> None:
        """Give the save that is under way its time when training has ended with an error; without collectives."""
        if self._under_way is not None:
            self._under_way.written.wait()
            self._under_way.thread.join(_CLOSE_SECONDS)
            self._under_way.abandoned.set()

    def _begin(self, batch: int) -> None:
        self.finish()
        with together(f"checkpoint ba{batch}"):  # no rank writes before the directory is there
            if rank() == 0:
                self.store.begin(batch)

    def _discard(self, batch: int) -> None:
        if rank() == 0:
            self.store.discard(batch)

    def _staged(self, shards: Mapping[Shard, Tensor]) -> list[Tensor]:
        """Copy into CPU memory, pinned where values come from a GPU; the next call overwrites it."""
        for shard, values in shards.items():
            if shard not in self._buffers:
                self._buffers[shard] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        _copy({self._buffers[shard]: values for shard, values in shards.items()})
        return [self._buffers[shard] for shard in shards]


def _copy(sources: Mapping[Tensor, Tensor]) -> None:
    """Overwrite each key with its value. A GPU copies by itself; CPU memory is faster than one core."""
    if any(values.is_cuda for values in sources.values()):
        for target, values in sources.items():
            target.copy_(values, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return
    targets = sorted(sources, key=lambda target: target.nbytes, reverse=True)  # so that threads have equal shares
    shares = [share for first in range(_COPYING_THREADS) if (share := targets[first::_COPYING_THREADS])]
    with ThreadPoolExecutor(_COPYING_THREADS) as pool:
        list(pool.map(lambda share: torch._foreach_copy_(share, [sources[target] for target in share]), shares))


def retain_and_upload(store: CheckpointStore, retention: Retention, remote: str | None, checkpoint: Path) -> None:
    """Delete the checkpoints that ``checkpoint`` replaces, and upload it; one process does it, when it is published.

    Raises:
        UserError: The disk or the remote store fails. The checkpoint is complete in ``store``.
    """
    with saying(f"checkpoint {checkpoint.name} was saved, but those that it replaces were not deleted"):
        store.retain(retention)
    if remote is not None:
        with saying(f"checkpoint {checkpoint.name} was saved, but not uploaded"):
            upload_checkpoint(checkpoint, remote)


class _BackgroundSave:
    """One save, from the moment that its values are safe.

    Attributes:
        written: Set when this rank's file is there, or has failed.
        abandoned: Set when another rank has failed, so that its note will never come.
    """

    def __init__(
        self,
        store: CheckpointStore,
        published: Callable[[Path], None],
        batch: int,
        plan: SavePlan,
        values: Sequence[Tensor],
        state: Mapping[str, Any],
        origin: Origin,
    ) -> None:
        self.batch = batch
        self.written = threading.Event()
        self.abandoned = threading.Event()
        self._error: Exception | None = None
        self._store, self._published, self._staging = store, published, store.staging_path(batch)
        self._plan, self._values, self._state, self._origin = plan, values, state, origin
        self._rank = rank()
        self.thread = threading.Thread(target=self._run, name=f"save of ba{batch}", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise the error of this rank's part, if there was one."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with saying(f"checkpoint ba{self.batch} was not saved"):
                published = self._save()
            if published:
                self._published(self._store.path(self.batch))
        except Exception as error:
            self._error = error
            print(f"warning: {describe(error)}", file=sys.stderr, flush=True)
        finally:
            self.written.set()  # after a failure, when it can be seen

    def _save(self) -> bool:
        """Do this rank's part. Returns whether it has given the checkpoint its final name."""
        path, note = self._staging / data_file(self._rank), self._note(self._rank)
        written = write_file(path, self._values)
        self._values = []
        note.with_suffix(".tmp").write_text(json.dumps(written))
        note.with_suffix(".tmp").rename(note)
        self.written.set()
        if self._rank != 0 or (files := self._noted_files()) is None:
            return False
        commit_files(self._staging, self._plan, files, self._state, self._origin)
        self._store.publish(self.batch)
        return True

    def _noted_files(self) -> list[WrittenFile] | None:
        """Wait for the notes of all ranks. None if the save is abandoned before they are there."""
        notes = [self._note(rank) for rank in range(len(self._plan))]
        while not all(note.exists() for note in notes):
            if self.abandoned.is_set():
                return None
            time.sleep(_POLL_SECONDS)
        files = []
        for name, shards, hashes in (json.loads(note.read_text()) for note in notes):
            files.append(
                WrittenFile(name, [FileRange(*each) for each in shards], [HashRange(*each) for each in hashes])
            )
        for note in notes:
            note.unlink()
        return files

    def _note(self, rank: int) -> Path:
        return self._staging / f".part-{rank}.json"
