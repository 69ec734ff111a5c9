"""Running of trials: each in processes of its own, several at a time, on again after a kill.

A trial has ended when its directory holds ``trial.json``; all others are started, or go on from their checkpoints, when
the sweep is started again. A signal to the sweep stops its trials, which save; and so does its death.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from moefoundry.checkpoint.lease import LEASE_FILE
from moefoundry.sweeping.trials import Trial, write_whole

ENDED, LOG = "trial.json", "log.txt"
EXIT_STOPPED = 75
LEASE_SECONDS = 90.0
"""Time that a run of an earlier, killed sweep is given to save and end."""

Report = Callable[[Trial, str], None]


class Stopped(Exception):  # noqa: N818  # an answer, not an error
    """A signal has ended the sweep; its trials have saved."""

    def __init__(self, number: int) -> None:
        self.number = number


def is_done(trial: Trial) -> bool:
    """Tell if a trial has ended well."""
    return (trial.run_dir / ENDED).exists()


def command_of(recipe: str | None, trial: Trial, ranks: int) -> list[str]:
    """Build the command of a trial's run."""
    binaries = Path(sys.executable).parent
    launcher = [str(binaries / "composer"), "-n", str(ranks)] if ranks > 1 else [sys.executable]
    return [*launcher, "-m", "moefoundry", "train", *([recipe] if recipe else []), *trial.overrides]


def run_all(
    trials: Sequence[Trial], command: Callable[[Trial], list[str]], at_once: int, report: Report
) -> dict[str, int]:
    """Run every trial that has not ended.

    Args:
        trials: The trials; those with a problem are left out.
        command: Makes the command of a trial.
        at_once: Trials that run side by side.
        report: Called when a trial begins and ends, with a word for it.

    Returns:
        The exit status of each trial that failed, by label.

    Raises:
        Stopped: A signal has ended it.
    """
    failed: dict[str, int] = {}
    with _stopping() as running, ThreadPoolExecutor(at_once) as pool:
        ahead = [trial for trial in trials if not trial.problem and not is_done(trial)]
        for trial, status in pool.map(lambda trial: (trial, _run(trial, command(trial), running, report)), ahead):
            if status not in (0, None):
                failed[trial.label] = status
    if running.stopped_by:
        raise Stopped(running.stopped_by)
    return failed


class _Running:
    """Processes of the trials that run now."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped_by = 0
        self.lock = threading.Lock()

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes] | None:
        with self.lock:
            if self.stopped_by:
                return None
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=partial(_end_with, os.getpid()),
                )
            self.processes.add(process)
            return process

    def stop(self, number: int) -> None:
        self.stopped_by = number
        for process in list(self.processes):
            with suppress(ProcessLookupError):
                process.terminate()


@contextmanager
def _stopping() -> Iterator[_Running]:
    """Pass SIGTERM and Ctrl-C on to the trials, as SIGTERM, for which a run saves."""
    running = _Running()

    def stop(number: int, _: FrameType | None) -> None:
        running.stop(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(trial: Trial, command: list[str], running: _Running, report: Report) -> int | None:
    """Run one trial to its end. Returns its exit status; None if it was stopped, or not started for a signal."""
    trial.run_dir.mkdir(parents=True, exist_ok=True)
    _wait_for_lease(trial.run_dir, running)
    begin = time.monotonic()
    process = running.start(command, trial.run_dir / LOG)
    if process is None:
        return None
    report(trial, "begins")
    status = process.wait()
    running.processes.discard(process)
    seconds = time.monotonic() - begin
    if status == 0:
        write_whole(trial.run_dir / ENDED, json.dumps({"point": trial.point, "seconds_of_last_start": seconds}))
        report(trial, f"done in {seconds:,.0f} s")
        return 0
    if status == EXIT_STOPPED or running.stopped_by:
        report(trial, "stopped; it goes on when the sweep is started again")
        return None
    report(trial, f"failed with exit status {status}: {_last_line(trial.run_dir / LOG)}")
    return status


def _wait_for_lease(run_dir: Path, running: _Running) -> None:
    """Wait for the end of a run that a killed sweep has left; training itself refuses one that stays."""
    until = time.monotonic() + LEASE_SECONDS
    while (run_dir / LEASE_FILE).exists() and time.monotonic() < until and not running.stopped_by:
        if not _holder_lives(run_dir / LEASE_FILE):
            return
        time.sleep(0.2)


def _holder_lives(lease: Path) -> bool:
    """Tell if the process that wrote a lease on this host is there."""
    try:
        pid = json.loads(lease.read_text())["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1] + f" ({log})"


def _end_with(parent: int) -> None:
    """Ask Linux for SIGTERM when the sweep dies, even of SIGKILL; end at once if it has died already."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(EXIT_STOPPED)
