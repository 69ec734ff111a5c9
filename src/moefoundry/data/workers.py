"""Processes that share a list of jobs.

They are forked, so a job may be any function of what is in memory already: libraries, the corpus, the tokenizer. A
process that dies is an error, never a silence; when the caller ends, whatever ends it, they end too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

from moefoundry.config.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int, int], None]
"""Callback for progress: documents and bytes of UTF-8 more."""

REPORT_SECONDS = 0.2
PARALLELISM = "TOKENIZERS_PARALLELISM"
"""Environment variable of the tokenizers library; ``false`` starts no threads."""


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[T, Advance], R], jobs: Sequence[T], workers: int, advance: Advance, done: Callable[[R], None]
) -> None:
    """Call ``function`` with each job, in forked processes; few jobs in this process, with the tokenizer's threads.

    Args:
        function: Called with a job and a callback for its progress. Its result and its errors must be picklable.
        jobs: The jobs; they start in this order.
        workers: Processes. Where there would be work for less than half of them, and with 0, there are none.
        advance: Called with the progress of all.
        done: Called with each result, in the order in which they end.

    Raises:
        UserError: A process died.
        Exception: The first error of ``function``.
    """
    if len(jobs) == 1 or 2 * len(jobs) < workers or not workers:
        for job in jobs:
            done(function(job, advance))
        return
    context = get_context("fork")
    processes: dict[Connection, BaseProcess] = {}
    try:
        with _without_threads():
            for _ in range(min(workers, len(jobs))):
                here, there = context.Pipe()
                arguments = (function, jobs, there, [*processes, here])
                processes[here] = context.Process(target=_serve, args=arguments, daemon=True)
                processes[here].start()
                there.close()
        _deal_out(len(jobs), processes, advance, done)
    finally:
        for process in processes.values():
            process.kill()  # one that hangs in the fork of a process with threads hears nothing else
        for connection, process in processes.items():
            process.join()
            connection.close()


def _deal_out(
    jobs: int, processes: dict[Connection, BaseProcess], advance: Advance, done: Callable[[Any], None]
) -> None:
    numbers = iter(range(jobs))
    busy = set(processes)
    for connection in processes:
        connection.send(next(numbers))
    while busy:
        ready = set(wait(list(busy)))
        for connection in busy & ready:
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                processes[connection].join()
                raise UserError(_death(processes[connection].exitcode)) from None
            if kind == "progress":
                advance(*value)
            elif kind == "failed":
                raise value
            else:
                done(value)
                if (number := next(numbers, None)) is None:
                    busy.remove(connection)
                else:
                    connection.send(number)


def _death(status: int | None) -> str:
    how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
    memory = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
    return f"a worker process ended ({how}{memory}); the same command goes on from there, with fewer workers=... if so"


@contextmanager
def _without_threads() -> Iterator[None]:
    """Start processes in which the tokenizer has no threads: those of this process do not come along."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


def _end_with(parent: int) -> None:
    """End this process when the other one has ended."""
    while os.getppid() == parent:
        time.sleep(REPORT_SECONDS)
    os._exit(1)


def _serve(
    function: Callable[[T, Advance], R], jobs: Sequence[T], connection: Connection, others: list[Connection]
) -> None:
    """Run the jobs whose numbers come, in a forked process, until the caller is gone."""
    for other in others:
        other.close()  # so that this process sees the end of the caller
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the caller ends this one
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    progress = _Progress(connection)
    try:
        while True:
            job = jobs[connection.recv()]
            try:
                result = function(job, progress.advance)
            except Exception as error:
                connection.send(("failed", error))
            else:
                progress.send()
                connection.send(("done", result))
    except (EOFError, OSError):
        pass  # the caller is gone
    finally:
        os._exit(0)  # nothing of the caller is to be cleaned up here


class _Progress:
    """Progress that is sent now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._documents = self._bytes = 0
        self._next = 0.0

    def advance(self, documents: int, size: int) -> None:
        self._documents += documents
        self._bytes += size
        if time.monotonic() > self._next:
            self.send()

    def send(self) -> None:
        self._connection.send(("progress", (self._documents, self._bytes)))
        self._documents = self._bytes = 0
        self._next = time.monotonic() + REPORT_SECONDS
