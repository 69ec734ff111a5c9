"""Ranks on this machine, forked from this process, for as long as a check takes.

A fork starts in milliseconds, where an interpreter takes half a minute to import the libraries; and whatever has been
changed in this process is changed in the ranks. This process itself must neither compute nor touch a GPU. Each rank is
a process with the environment that a launcher gives, joined to the others over a file. All have an end: the time of
every world is bounded, and at its end, or after the first failure, all of its ranks are killed.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

from moefoundry.config import UserError

SECONDS = 120.0
"""Time of a world, unless its check needs another."""
GRACE_SECONDS = 2.0
"""Time that the other ranks have to fail by themselves once one has failed: the first is not always the cause."""

_context = multiprocessing.get_context("fork")


class RankError(Exception):
    """A rank failed, was killed, or ran out of time; the message says which, and how, in one line."""


class World:
    """A function on every rank of a new world; leaving the ``with`` block kills the ranks that are left.

    Args:
        fn: The function.
        args: Its arguments, the same on every rank.
        ranks: Number of ranks.
        room: Directory for files of the ranks.
        gpu: Rank r computes on GPU r; otherwise on CPUs.
        seconds: Time until the ranks are killed.
    """

    def __init__(
        self, fn: Callable[..., Any], *args: Any, ranks: int, room: Path, gpu: bool = False, seconds: float = SECONDS
    ) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="ranks-", dir=room))
        self._deadline = time.monotonic() + seconds
        self._readers: list[connection.Connection] = []
        self._processes = []
        for rank in range(ranks):
            reader, writer = _context.Pipe(duplex=False)
            target = (writer, self._place, rank, ranks, gpu, seconds, fn, args)
            process = _context.Process(target=_live, args=target, name=f"rank {rank}")
            process.start()
            writer.close()
            self._readers.append(reader)
            self._processes.append(process)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for reader in self._readers:
            reader.close()
        shutil.rmtree(self._place, ignore_errors=True)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        pid = self._processes[rank].pid
        assert pid is not None, "started"
        os.kill(pid, number)

    def kill(self) -> None:
        """Kill all ranks, as a node does that loses power."""
        for process in self._processes:
            process.kill()

    def alive(self) -> bool:
        """Tell if any rank is alive."""
        return any(process.is_alive() for process in self._processes)

    def results(self) -> list[Any]:
        """Wait for what every rank returns, by rank.

        Raises:
            RankError: A rank failed, was killed or ran out of time.
        """
        found: dict[int, Any] = {}
        failures: list[str] = []
        pending = dict(zip(self._readers, range(len(self._readers)), strict=True))
        deadline = self._deadline
        while pending and time.monotonic() < deadline:
            for reader in connection.wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
                assert isinstance(reader, connection.Connection)
                rank = pending.pop(reader)
                try:
                    found[rank], failure = pickle.loads(reader.recv_bytes())
                except EOFError:
                    self._processes[rank].join(GRACE_SECONDS)
                    failure = f"ended with exit status {self._processes[rank].exitcode}"
                if failure and not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failures += [f"rank {rank}: {failure}"] if failure else []
        if pending and not failures:
            rank = min(pending.values())
            failures = [f"rank {rank}: ran out of time{self._place_in_code(rank)}"]
        if failures:
            raise RankError(min(failures, key=_is_consequence))
        return [found[rank] for rank in sorted(found)]

    def text(self, rank: int = 0) -> str:
        """Return what a rank has printed."""
        log = self._place / f"{rank}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _place_in_code(self, rank: int) -> str:
        """Say where a rank is, which ends it: the stack is written by the handler of a signal."""
        self.signal(rank, signal.SIGABRT)
        self._processes[rank].join(GRACE_SECONDS)
        stack = self.text(rank).rpartition("(most recent call first):")[2].strip().splitlines()
        return f" in {stack[0].strip()}" if stack else ""


def _is_consequence(failure: str) -> bool:
    """Tell a failure that another rank's end has brought about."""
    return any(word in failure for word in ("CollectiveError", "Connection closed", "Connection reset", "DistError"))


def _live(
    writer: connection.Connection,
    place: Path,
    rank: int,
    ranks: int,
    gpu: bool,
    seconds: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Live the life of a rank: its output goes to a file, its result to the parent."""
    log = os.open(place / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=log)
    try:
        _join(place, rank, ranks, gpu, seconds)
        message = (fn(*args), "")
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        message = (None, text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
    writer.send_bytes(pickle.dumps(message))  # not send, which would share tensors of a process that ends


def _join(place: Path, rank: int, ranks: int, gpu: bool, seconds: float) -> None:
    """Set the environment of a rank, and join the process group."""
    from datetime import timedelta

    world = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")  # that nobody listens on: the file is the store
    os.environ.pop("TORCHELASTIC_RESTART_COUNT", None)
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"file://{place / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    dist.barrier()  # a rank that returns at once must not close connections that another is still opening
