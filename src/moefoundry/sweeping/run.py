"""Running of trials: each in processes of its own, several at a time, on again after a kill.

A trial has ended when its directory holds ``trial.json``; all others are started, or go on from their checkpoints, when
the sweep is started again. One whose loss or gradients were not finite has ended, too: it would come to the same end. A
signal to the sweep stops its trials, which save; and so does its death.
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
from typing import Any

from moefoundry.config.errors import EXIT_STOPPED
from moefoundry.launching.local import launcher
from moefoundry.runs.history import read_history
from moefoundry.sweeping.trials import Trial, write_whole

ENDED, LOG = "trial.json", "log.txt"
ASKING_SECONDS = 1.0
LEASE_SECONDS = 90
"""Time that a run of an earlier, killed sweep is given to save and end."""

Report = Callable[[Trial, str], None]


class Stopped(Exception):  # noqa: N818  # an answer, not an error
    """A signal has ended the sweep; its trials have saved."""

    def __init__(self, number: int) -> None:
        self.number = number


def is_done(trial: Trial) -> bool:
    """Tell if a trial has ended well, was pruned, or has diverged."""
    return (trial.run_dir / ENDED).exists()


def is_pruned(trial: Trial) -> bool:
    """Tell if a trial was ended because others were better."""
    return bool(_ended(trial).get("pruned"))


def diverged_at(trial: Trial) -> int | None:
    """Give the batch whose loss or gradients were not finite, if that ended a trial."""
    found = _ended(trial).get("diverged_at")
    return found if isinstance(found, int) else None


def _ended(trial: Trial) -> dict[str, Any]:
    """Read how a trial has ended; empty where it has not, or where the file is damaged."""
    try:
        found = json.loads((trial.run_dir / ENDED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def command_of(recipe: str | None, trial: Trial, ranks: int) -> list[str]:
    """Build the command of a trial's run."""
    return [
        *launcher(ranks, Path(sys.executable)),
        "-m",
        "moefoundry",
        "train",
        f"--wait={LEASE_SECONDS}",
        *([recipe] if recipe else []),
        *trial.overrides,
    ]


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
    with running(command, report) as runner, ThreadPoolExecutor(at_once) as pool:
        ahead = [trial for trial in trials if not trial.problem and not is_done(trial)]
        for trial, status in pool.map(lambda trial: (trial, runner.run(trial)), ahead):
            if status not in (0, None):
                failed[trial.label] = status
    return failed


class Runner:
    """Starts trials and waits for them, until a signal stops all that run.

    Args:
        command: Makes the command of a trial.
        report: Called when a trial begins and ends, with a word for it.
    """

    def __init__(self, command: Callable[[Trial], list[str]], report: Report) -> None:
        self.command, self.report = command, report
        self.stopped_by = 0
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def stop(self, number: int) -> None:
        """End all trials as SIGTERM does, for which a run saves, and start no more."""
        self.stopped_by = number
        for process in list(self._processes):
            with suppress(ProcessLookupError):
                process.terminate()

    def run(self, trial: Trial, is_hopeless: Callable[[], bool] | None = None) -> int | None:
        """Run one trial to its end.

        Args:
            trial: The trial.
            is_hopeless: Asked every second; the trial ends, and counts as pruned, where it says so.

        Returns:
            The exit status, 0 for a pruned trial and for one that has diverged, too; None if it was stopped, or not
            started for a signal.
        """
        trial.run_dir.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        if (process := self._start(trial)) is None:
            return None
        self.report(trial, "begins")
        pruned = self._wait(process, is_hopeless)
        status, seconds = process.returncode, time.monotonic() - begin
        if self.stopped_by or (status == EXIT_STOPPED and not pruned):
            self.report(trial, "stopped; it goes on when the sweep is started again")
            return None
        diverged = not_finite(trial.run_dir) if status and not pruned else None
        if status and not pruned and diverged is None:
            self.report(trial, f"failed with exit status {status}: {_last_line(trial.run_dir / LOG)}")
            return status
        ended = {"point": trial.point, "pruned": pruned, "diverged_at": diverged, "seconds_of_last_start": seconds}
        write_whole(trial.run_dir / ENDED, json.dumps(ended))
        word = "pruned" if pruned else "done" if diverged is None else f"diverged in batch {diverged}"
        self.report(trial, f"{word} after {seconds:,.0f} s")
        return 0

    def _start(self, trial: Trial) -> subprocess.Popen[bytes] | None:
        with self._lock, (trial.run_dir / LOG).open("ab") as output:
            if self.stopped_by:
                return None
            process = subprocess.Popen(
                self.command(trial),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(_end_with, os.getpid()),
            )
            self._processes.add(process)
            return process

    def _wait(self, process: subprocess.Popen[bytes], is_hopeless: Callable[[], bool] | None) -> bool:
        """Wait for a process. Tells if it was pruned."""
        pruned = False
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(None if is_hopeless is None or pruned else ASKING_SECONDS)
                break
            if is_hopeless is not None and is_hopeless() and process.poll() is None:
                pruned = True
                process.terminate()
        self._processes.discard(process)
        return pruned


@contextmanager
def running(command: Callable[[Trial], list[str]], report: Report) -> Iterator[Runner]:
    """Make a runner, to which SIGTERM and Ctrl-C are passed on.

    Raises:
        Stopped: A signal came.
    """
    runner = Runner(command, report)

    def stop(number: int, _: FrameType | None) -> None:
        runner.stop(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield runner
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if runner.stopped_by:
        raise Stopped(runner.stopped_by)


def not_finite(run_dir: Path) -> int | None:
    """Give the batch that was not finite, if the run's history says that this ended it (``callbacks/health.py``)."""
    last = (read_history(run_dir) or [{}])[-1]
    return int(last["batch"]) + 1 if str(last.get("reason", "")).startswith("NonFiniteError:") else None


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
