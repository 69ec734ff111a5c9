"""Run an untrusted Python function against a test, in a sandbox, and say how it ended."""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from moefoundry.config.errors import UserError

_ROOT = Path(__file__).parents[3]  # from which the fresh Python imports this package
_START = "import sys; sys.path.append({root!r}); from moefoundry.evaluation.sandbox.inside import main; main()"
_SECONDS_TO_START = 60.0


class SandboxError(UserError):
    """The sandbox could not start, or the test itself is broken: nothing is known of the program."""


class BrokenTestError(SandboxError):
    """The test, or what it may use, is broken."""


class Outcome(StrEnum):
    """Ways in which a program ends."""

    PASSED = "passed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        seconds: Wall-clock time from the moment its process is ready; CPU time is limited to the next whole second.
        memory_bytes: Address space.
        output_bytes: Bytes on standard output and standard error together.
        file_bytes: Bytes of a file, and of all files in a scratch directory in memory.

    Raises:
        UserError: One of them is not above 0.
    """

    seconds: float = 3.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value}: must be a number above 0")


@dataclass(frozen=True)
class Ending:
    """An ending of a program.

    Attributes:
        outcome: The kind of ending.
        error: Last line of the error, or the limit that it met; empty if it passed.
        seconds: Wall-clock time.
        layers: Parts of the sandbox that this machine's kernel granted; :func:`statement` explains them.
    """

    outcome: Outcome
    error: str
    seconds: float
    layers: frozenset[str]


def run(
    program: str,
    test: str,
    entry_point: str,
    *,
    prelude: str = "",
    limits: Limits | None = None,
    namespaces: bool = True,
) -> Ending:
    """Run ``program``, then ``test`` in another process, to which ``entry_point`` is the program's function.

    Arguments and results cross as plain data: numbers, strings, bytes, lists, tuples, sets, dictionaries, ranges and
    iterators. The program has passed when the test has run to its end.

    Args:
        program: Source of the untrusted program.
        test: Source of the test, which calls ``entry_point`` and raises if it fails. It is confined in the same way.
        entry_point: Name of the function under test.
        prelude: Source that the test's process runs first, such as helpers; never the program.
        limits: Limits of each of the two processes.
        namespaces: False leaves namespaces out, as a kernel does that refuses them.

    Raises:
        SandboxError: The sandbox did not start.
        BrokenTestError: ``prelude`` or ``test`` is no valid Python, or ``prelude`` fails.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="moefoundry-sandbox-", ignore_cleanup_errors=True) as place:
        os.chmod(place, 0o711)  # another uid passes through to the scratch directory
        directories = {name: f"{place}/{name}" for name in ("root", "scratch")}
        for directory in directories.values():
            os.mkdir(directory)
        job = {
            "program": program,
            "entry_point": entry_point,
            "parent": os.getpid(),
            "namespaces": namespaces,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "cpu_seconds": math.ceil(limits.seconds),
            **directories,
        }
        return _supervised(job, {"prelude": prelude, "test": test}, limits)


def _supervised(job: dict[str, object], test: dict[str, str], limits: Limits) -> Ending:
    """Start the sandbox's processes, watch them, and kill all of them at the end."""
    verdict, verdict_end = os.pipe()
    passed_on = [_memory_file(job), _memory_file(test), verdict_end]
    command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _START.format(root=str(_ROOT))]
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    try:
        process = subprocess.Popen(
            [*command, *map(str, passed_on)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=passed_on,
            env={"PYTHONHASHSEED": "0", **libraries},
            cwd="/",
            start_new_session=True,
        )
        for fd in passed_on:
            os.close(fd)
        assert process.stdout is not None
        try:
            return _watch(verdict, process.stdout.fileno(), limits)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its leader is not waited for yet: the number is still its own
            process.wait()
            process.stdout.close()
    finally:
        os.close(verdict)


def _watch(verdict: int, output: int, limits: Limits) -> Ending:
    """Read the verdict and the output until the verdict, the end of the processes or a limit."""
    lines, printed, first_output = b"", 0, b""
    layers: frozenset[str] | None = None
    began = time.monotonic()
    allowed = _SECONDS_TO_START
    with selectors.DefaultSelector() as selector:
        selector.register(verdict, selectors.EVENT_READ)
        selector.register(output, selectors.EVENT_READ)
        while True:
            left = began + allowed - time.monotonic()
            ready = {key.fd for key, _ in selector.select(max(left, 0))}
            if verdict in ready:
                text = os.read(verdict, 1 << 16)
                lines += text
                if layers is None and b"\n" in lines:
                    layers = frozenset(json.loads(lines[: lines.index(b"\n")]))
                    lines = lines[lines.index(b"\n") + 1 :]
                    began, allowed = time.monotonic(), limits.seconds
                if layers is not None and (not text or b"\n" in lines):
                    return _verdict(lines, time.monotonic() - began, layers)
                if not text:
                    raise SandboxError(f"the sandbox did not start: {_tail(output, first_output)}")
            if output in ready:
                text = os.read(output, 1 << 16)
                printed += len(text)
                first_output = (first_output + text)[:4096]
                if not text:
                    selector.unregister(output)
                if printed > limits.output_bytes and layers is not None:
                    error = f"more than {limits.output_bytes} bytes of output"
                    return Ending(Outcome.OUTPUT, error, time.monotonic() - began, layers)
            if left <= 0:
                if layers is None:
                    raise SandboxError(f"the sandbox did not start within {_SECONDS_TO_START:g} s")
                return Ending(Outcome.TIMEOUT, f"more than {limits.seconds:g} s", limits.seconds, layers)


def _verdict(line: bytes, seconds: float, layers: frozenset[str]) -> Ending:
    if not line:
        return Ending(Outcome.FAILED, "the judge ended before its verdict", seconds, layers)
    outcome, error = json.loads(line)
    if outcome == "test":
        raise BrokenTestError(f"the test is broken: {error}")
    return Ending(Outcome(outcome), error, seconds, layers)


def _tail(output: int, text: bytes) -> str:
    """Return the last line that the sandbox printed."""
    os.set_blocking(output, False)
    with suppress(BlockingIOError):
        text += os.read(output, 1 << 16)
    return (text.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]


def _memory_file(content: object) -> int:
    """Write JSON to a file in memory and return its descriptor, at its beginning."""
    fd = os.memfd_create("moefoundry-sandbox")
    with open(fd, "w", encoding="utf-8", closefd=False) as file:
        json.dump(content, file)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def statement(layers: frozenset[str] | None = None) -> str:
    """Say what the sandbox stops and what it leaves open, one line each.

    Args:
        layers: Layers of an :class:`Ending`; those of this machine, found by a trial, if None.
    """
    if layers is None:
        layers = run("def f(): pass", "f()", "f", limits=Limits(seconds=30)).layers
    files = bool(layers & {"root", "landlock"})
    calls = "seccomp" in layers
    found = [
        ("forging a pass from inside the program", True, "the test runs in another process"),
        ("time, memory, output and size of a file beyond the limits", True, "limits of the kernel, killed if need be"),
        ("secrets in the environment", True, "it is empty"),
        ("network", calls or "namespaces" in layers, "no socket, or none that leads anywhere"),
        ("reading files", files, "all but Python's own directories and the system's libraries"),
        ("writing files", files, "all but an empty scratch directory"),
        ("many files that fill the disk", "root" in layers, "the scratch directory is in memory and small"),
        ("changing modes, owners and times of files", calls or "root" in layers, "refused or out of sight"),
        ("new processes and leaving the process group", calls, "refused"),
        ("signals to other processes", calls or "namespaces" in layers, "refused, or no other process is seen"),
        ("survivors", calls or "namespaces" in layers, "every process is killed at the end"),
        (
            "rights of the user who runs it",
            bool(layers & {"uid", "root"}),
            "it has none of them, or sees nothing of theirs",
        ),
        ("errors of the kernel itself", False, "use a virtual machine if that matters"),
    ]
    lines = [f"stopped: {what} ({how})" if done else f"NOT stopped: {what}" for what, done, how in found]
    return "\n".join([f"layers: {', '.join(sorted(layers)) or 'limits alone'}", *lines])
