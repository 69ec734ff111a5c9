"""Run a function on several ranks from inside a test, in a second rather than in a minute.

The libraries take many seconds to import, so ranks are not started but forked, from a server process that has imported
everything once (``multiprocessing``'s forkserver). A rank is a process of its own, with the environment that a launcher
gives it, joined to the others by gloo. Ranks of one call never see those of another.

    def total(start):
        value = torch.tensor(float(start + dist.get_rank()))
        dist.all_reduce(value)
        return value.item()

    def test_total():
        assert run_distributed(total, 2, 10) == [21.0, 21.0]
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

PRELOAD = [
    "moefoundry.trainer",
    "moefoundry.cli.main",
    "moefoundry.cli.train",
    "moefoundry.launching.local",
    "moefoundry.llm_foundry.recipe",
    "moefoundry.model.mla",
    "moefoundry.optim",
    "moefoundry.ops.stochastic_rounding",
    "composer.algorithms",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "mlflow",
    "pytest",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
    "wandb",
    "tests.preloaded",
]
START_SECONDS = 180.0  # what the server's imports may take on a busy machine
GRACE_SECONDS = 3.0  # how long the other ranks may run on once one has failed

_context = multiprocessing.get_context("forkserver")
_segments = count(os.getpid() * 100_000, 10)  # first of ten numbers that name a call's shared memory


class RankError(RuntimeError):
    """A rank died or hung; the message says which, and how."""


def start_server() -> None:
    """Begin the imports in the background; the first :func:`run_distributed` waits for their end."""
    os.environ.setdefault("RANKS_PATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    _context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``fn(*args)`` on every rank of a new world.

    Args:
        fn: A function at the top level of a module. With one rank there is no process group, as in a plain process.
        world_size: Number of ranks.
        args: The same on every rank; pickled.
        timeout: Seconds that ``fn`` may take; then the stacks of the ranks that hang are reported.

    Returns:
        What each rank returned, by rank; tensors are on the CPU.

    Raises:
        RankError: A rank was killed, exited, or hung.
        Exception: What ``fn`` raised on the rank that failed first, with a note for each rank that failed.
    """
    start_server()
    segment = next(_segments)
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        readers, processes = [], []
        try:
            for rank in range(world_size):
                reader, writer = _context.Pipe(duplex=False)
                target = (writer, Path(scratch), rank, world_size, segment, timeout, fn, args)
                process = _context.Process(target=_run_rank, args=target, name=f"rank {rank}")
                process.start()
                writer.close()
                readers.append(reader)
                processes.append(process)
            results = _collect(readers, processes, Path(scratch), timeout)
            for process in processes:  # lets a rank end the processes that it has started
                process.join(GRACE_SECONDS)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for reader in readers:
                reader.close()
            _remove_shared_memory(segment)


def _run_rank(
    writer: connection.Connection,
    scratch: Path,
    rank: int,
    world_size: int,
    segment: int,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of one rank: its output goes to a file, its outcome to the parent."""
    log = os.open(scratch / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=log)
    try:
        _join_world(scratch, rank, world_size, segment, timeout)
        faulthandler.dump_traceback_later(timeout, exit=True, file=log)
        outcome = (fn(*args), None, "")
        message = pickle.dumps(_to_cpu(outcome))
    except BaseException as error:
        message = _pickle_error(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    writer.send_bytes(message)


def _join_world(scratch: Path, rank: int, world_size: int, segment: int, timeout: float) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from streaming.base.shared import prefix

    tempfile.tempdir = str(scratch)
    # Loader processes start as in training. From the server's kind they would get another server, with all its imports.
    multiprocessing.set_start_method("fork", force=True)
    # What ranks leave in shared memory is removed after the call; the tracker would warn of what killed ones have left.
    resource_tracker.register = resource_tracker.unregister = lambda name, kind: None
    # Names of a call's own: neither a killed run of this machine nor another test can be met, and all can be removed.
    prefix._each_prefix_int = lambda: count(segment)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{scratch / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=START_SECONDS),  # a busy machine forks slowly; the test's own time begins below
        )
        dist.barrier()  # a rank that returns at once must not close connections that another is still opening
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), dist.group.WORLD)  # torch < 2.14 has no other


def _to_cpu(value: Any) -> Any:
    import torch

    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), value)


def _pickle_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        message = pickle.dumps((None, error, text))
        pickle.loads(message)
    except Exception:  # whatever an exception's own constructor may do
        message = pickle.dumps((None, RankError(f"{type(error).__name__}: {error}"), text))
    return message


def _collect(readers: list[connection.Connection], processes: list[Any], scratch: Path, timeout: float) -> list[Any]:
    """Every rank's result; or the first failure, once the others have had time to fail by themselves."""
    results: list[Any] = [None] * len(readers)
    failure: BaseException | None = None
    pending = dict(zip(readers, range(len(readers)), strict=True))
    deadline = time.monotonic() + START_SECONDS + timeout
    while pending and time.monotonic() < deadline:
        for reader in connection.wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
            rank = pending.pop(reader)
            results[rank], error, text = _receive(reader, processes[rank], rank, scratch)
            if error is None:
                continue
            if failure is None:
                failure, deadline = error, min(deadline, time.monotonic() + GRACE_SECONDS)
            failure.add_note(f"rank {rank}: {text}\n{_tail(scratch, rank)}")
    if failure is not None:
        raise failure
    if pending:
        raise RankError(f"ranks {sorted(pending.values())} never started")
    return results


def _receive(reader: connection.Connection, process: Any, rank: int, scratch: Path) -> tuple[Any, Any, str]:
    try:
        return pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join(GRACE_SECONDS)
        hung = "Timeout (" in _tail(scratch, rank)
        reason = "ran out of time" if hung else f"ended with exit status {process.exitcode}"
        return None, RankError(f"rank {rank} {reason}"), reason


def _tail(scratch: Path, rank: int, characters: int = 6000) -> str:
    log = scratch / f"rank{rank}.log"
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""


def _remove_shared_memory(segment: int) -> None:
    """What killed ranks have left; streaming's names begin with a number."""
    for number in range(segment, segment + 10):
        for path in Path("/dev/shm").glob(f"{number:06}_*"):
            path.unlink(missing_ok=True)


@contextmanager
def captured_output() -> Iterator[list[str]]:
    """For ranks: the list gets what the process writes to standard output and standard error, in this order."""
    texts: list[str] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        saved = os.dup(1), os.dup(2)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for file, descriptor, copy in zip((out, err), (1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
                file.seek(0)
                texts.append(file.read())
