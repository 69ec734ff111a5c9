"""Processes that a benchmark starts and always ends, and a line-by-line channel to them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

GRACE_SECONDS = 20.0
LOG_TAIL = 6000
NODE = {"NODE_RANK": "0"}  # LLM Foundry asks for it, and torchrun does not set it


class Channel:
    """JSON values over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rw")

    def send(self, value: Any) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def receive(self) -> Any:
        """The next value.

        Raises:
            EOFError: The other end has gone.
        """
        line = self._file.readline()
        if not line:
            raise EOFError("the other process has ended")
        return json.loads(line)


def connect(address: str) -> Channel:
    """Connect to the process that waits in :func:`accept`."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return Channel(connection)


def listen(address: str) -> socket.socket:
    """A socket for :func:`accept`; make it before the process that connects to it."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    server.settimeout(1.0)
    return server


def accept(server: socket.socket, process: subprocess.Popen[bytes], log: Path) -> Channel:
    """Wait until ``process``, or a child of it, connects.

    Raises:
        RuntimeError: It ended instead; the message holds the end of its log.
    """
    while process.poll() is None:
        with suppress(TimeoutError):
            connection, _ = server.accept()
            connection.setblocking(True)
            return Channel(connection)
    raise failure(process, log)


def failure(process: subprocess.Popen[bytes], log: Path) -> RuntimeError:
    """The error that says how a process ended and what it wrote last."""
    tail = log.read_text(errors="replace")[-LOG_TAIL:]
    return RuntimeError(f"{subprocess.list2cmdline(process.args)}: exit status {process.poll()}\n{tail}")


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path, patience: float = 0.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, output to ``log``; on exit the whole group is gone.

    Args:
        patience: Seconds that it has to end by itself before it is told to (and in the end forced to).
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
            signal_group(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            signal_group(process, signal.SIGKILL)  # also children that outlived the launcher
            process.wait()


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and to all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
