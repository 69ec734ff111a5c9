"""Saves a checkpoint of all ranks, while training goes on if that is wanted.

A save has four parts:

    agree     on who writes what, by a collective; the answer is kept for the next save
    stage     each rank copies what it writes into CPU buffers, which are kept, too (asynchronous saves only)
    write     a thread of each rank writes its file and leaves a note about it, ``.part-{rank}.json``, beside it
    commit    the thread of rank 0, when it has seen every rank's note: index, manifest, marker, final name

Training stands still for the first two. The threads talk through the directory that they write to and never through a
process group, so they can neither deadlock nor reorder the collectives of training. Whether a save has failed is agreed
by all ranks in :meth:`Saver.finish`, which each save begins with: one save at most is in flight.
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

from moefoundry.checkpoint import io
from moefoundry.checkpoint.manifest import HashedBlock, Origin
from moefoundry.checkpoint.ranks import from_every_rank, rank
from moefoundry.checkpoint.store import CheckpointStore
from moefoundry.checkpoint.writer import (
    Piece,
    Place,
    Plan,
    data_file,
    describe,
    local_pieces,
    make_plan,
    saying,
    together,
    write_index,
    write_pieces,
)
from moefoundry.config import UserError

_COPYING_THREADS = 4
_POLL_SECONDS = 0.02
_CLOSE_SECONDS = 30.0


class Saver:
    """Saves checkpoints into ``store``, one after another; every rank has one and calls the same methods.

    Args:
        store: Where checkpoints go, on storage that all ranks share.
        published: Called on rank 0, in the thread that writes, when a checkpoint has its final name. Its errors are
            raised as those of the save are, but say what they are about by themselves: the checkpoint is there.
    """

    def __init__(self, store: CheckpointStore, published: Callable[[Path], None]) -> None:
        self.store = store
        self._published = published
        self._held: Sequence[Piece] = ()
        self._plan: Plan = ()
        self._buffers: dict[Piece, Tensor] = {}
        self._flight: _Flight | None = None

    def start(self, batch: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], origin: Origin) -> None:
        """Begin a save and return once the tensors may change again.

        Args:
            batch: Its number.
            tensors: As in :func:`io.write`.
            state: As there.
            origin: Where the checkpoint comes from.

        Raises:
            UserError: The batch has a checkpoint already, or the save before this one failed.
        """
        self._begin(batch)
        held = local_pieces(tensors)
        if any(from_every_rank(list(held) != self._held)):
            self._held, self._plan, self._buffers = list(held), make_plan(from_every_rank(list(held))), {}
        values = self._staged({piece: held[piece] for piece in self._plan[rank()]})
        self._flight = _Flight(self.store, batch, self._plan, values, state, origin, self._published)

    def save(self, batch: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], origin: Origin) -> None:
        """Save and return when the checkpoint is published; nothing is copied, and no thread has a part in it.

        Raises:
            UserError: As :meth:`start`; or this save failed, and nothing of it is left; or what follows it did.
        """
        self._begin(batch)
        try:
            with together(), saying(_not_saved(batch)):
                io.write(self.store.staging_path(batch), tensors, state, origin)
                if rank() == 0:
                    self.store.publish(batch)
        except UserError:
            self._discard(batch)
            raise
        with together():
            if rank() == 0:
                self._published(self.store.path(batch))

    def finish(self) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            UserError: It failed, on any rank; nothing of it is left, and what was saved before is untouched. Or what
                follows it did (``published``).
        """
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        try:
            with together():
                flight.written.wait()
                flight.check()
            with together():  # all notes are there: rank 0 does commit
                flight.thread.join()
                flight.check()
        except UserError:
            flight.abandoned.set()
            flight.thread.join()
            self._discard(flight.batch)
            raise

    def close(self) -> None:
        """Give the save in flight its time when training has ended with an error; without collectives."""
        if self._flight is not None:
            self._flight.written.wait()
            self._flight.thread.join(_CLOSE_SECONDS)
            self._flight.abandoned.set()

    def _begin(self, batch: int) -> None:
        self.finish()
        with together(), saying(f"checkpoint ba{batch}"):  # no rank writes before the directory is there
            if rank() == 0:
                self.store.begin(batch)

    def _discard(self, batch: int) -> None:
        if rank() == 0:
            self.store.discard(batch)

    def _staged(self, pieces: Mapping[Piece, Tensor]) -> Mapping[Piece, Tensor]:
        """Copies in CPU memory, pinned where they come from a GPU; overwritten by the next call."""
        for piece, values in pieces.items():
            if piece not in self._buffers:
                self._buffers[piece] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        _copy({self._buffers[piece]: values for piece, values in pieces.items()})
        return {piece: self._buffers[piece] for piece in pieces}


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


def _not_saved(batch: int) -> str:
    return f"checkpoint ba{batch} was not saved"


class _Flight:
    """One save, from the moment that its values are safe.

    Attributes:
        written: Set when this rank's file is there, or has failed.
        abandoned: Set when another rank has failed, so that its note will never come.
    """

    def __init__(
        self,
        store: CheckpointStore,
        batch: int,
        plan: Plan,
        values: Mapping[Piece, Tensor],
        state: Mapping[str, Any],
        origin: Origin,
        published: Callable[[Path], None],
    ) -> None:
        self.batch = batch
        self.written = threading.Event()
        self.abandoned = threading.Event()
        self._error: Exception | None = None
        self._store, self._staging = store, store.staging_path(batch)
        self._plan, self._values, self._state, self._origin = plan, values, state, origin
        self._published = published
        self._rank = rank()
        self.thread = threading.Thread(target=self._run, name=f"save of ba{batch}", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise what this rank's part has failed with."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with saying(_not_saved(self.batch)):
                published = self._save()
            if published:
                self._published(self._store.path(self.batch))
        except Exception as error:
            self._error = error
            print(f"warning: {describe(error)}", file=sys.stderr, flush=True)
        finally:
            self.written.set()  # after a failure, when it can be seen

    def _save(self) -> bool:
        """This rank's part; whether it has given the checkpoint its final name."""
        self._write()
        self.written.set()
        if self._rank != 0 or (notes := self._notes()) is None:
            return False
        self._commit(notes)
        return True

    def _write(self) -> None:
        """This rank's file and the note about it."""
        mine = self._plan[self._rank]
        path = self._staging / data_file(self._rank)
        places, blocks = write_pieces(path, [self._values[piece] for piece in mine])
        self._values = {}
        note = self._note(self._rank)
        note.with_suffix(".tmp").write_text(json.dumps({"places": places, "file": path.name, "blocks": blocks}))
        note.with_suffix(".tmp").rename(note)

    def _notes(self) -> list[dict[str, Any]] | None:
        """The notes of all ranks; None if the save is abandoned before they are there."""
        paths = [self._note(rank) for rank in range(len(self._plan))]
        while not all(path.exists() for path in paths):
            if self.abandoned.is_set():
                return None
            time.sleep(_POLL_SECONDS)
        notes = [json.loads(path.read_text()) for path in paths]
        for path in paths:
            path.unlink()
        return notes

    def _commit(self, notes: Sequence[Mapping[str, Any]]) -> None:
        places = {
            piece: Place(*place)
            for pieces, note in zip(self._plan, notes, strict=True)
            for piece, place in zip(pieces, note["places"], strict=True)
        }
        blocks = {note["file"]: [HashedBlock(*block) for block in note["blocks"]] for note in notes}
        write_index(self._staging, places, blocks, self._state, self._origin)
        self._store.publish(self.batch)

    def _note(self, rank: int) -> Path:
        return self._staging / f".part-{rank}.json"
