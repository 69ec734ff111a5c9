"""Places of all ranks, when training stands still.

A thread of every rank looks at its main thread. Where that has been at one place, in one collective, for half of
``dist_timeout``, the rank asks for reports by a file in the run's directory, which the threads of all ranks look for:
they use no process group, which is what may be stuck. Each rank writes its stacks and its last collective to a file of
its own, and the one that has asked says on standard error which ranks are where. Nothing is ended: collectives give up
after ``dist_timeout`` as ever, and a step that was merely long goes on.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from composer.utils import dist

from moefoundry.callbacks.health import last_collective

DIRECTORY = "hang"
REQUEST = "asked"
OWN = "/moefoundry/"
IN_COLLECTIVES = ("/torch/distributed/", "/moefoundry/ops/all_to_all.py", "/composer/utils/dist.py")
SAMPLES = 10  # in the time after which a rank stands still
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """Place of a rank.

    Attributes:
        rank: Its number.
        collective: The collective that it waits in; empty if it is elsewhere.
        at: Innermost place in this package, as ``moe/dispatch.py:210, in wait``; behind it where that has called a
            library that is no collective.
    """

    rank: int
    collective: str
    at: str

    def __str__(self) -> str:
        return self.of([self.rank])

    def of(self, ranks: list[int]) -> str:
        """Say that these ranks are here."""
        several = len(ranks) > 1
        if self.collective:
            return f"{numbers(ranks)} {'wait' if several else 'waits'} in {self.collective}, at {self.at}"
        return f"{numbers(ranks)} {'are' if several else 'is'} at {self.at}"


@contextmanager
def watched_for_hangs(run_dir: Path, timeout_seconds: float) -> Iterator[None]:
    """Watch the thread that calls this, with one of its own.

    Args:
        run_dir: Directory that all ranks share.
        timeout_seconds: Seconds after which a collective gives up.
    """
    watch = _Watch(run_dir / DIRECTORY, timeout_seconds / 2, threading.get_ident())
    thread = threading.Thread(target=watch.run, name="watch for hangs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join(ANSWER_SECONDS)


def forget_hangs(run_dir: Path) -> None:
    """Remove the reports of an earlier start; one rank calls it."""
    shutil.rmtree(run_dir / DIRECTORY, ignore_errors=True)


class _Watch:
    def __init__(self, directory: Path, patience: float, thread: int) -> None:
        self.directory = directory
        self.patience = patience
        self.thread = thread
        self.rank, self.ranks = dist.get_global_rank(), dist.get_world_size()
        self.ended = threading.Event()

    def run(self) -> None:
        before, since, answered, asked = self._position(), time.monotonic(), False, False
        while not self.ended.wait(self.patience / SAMPLES):
            now, requested = self._position(), (self.directory / REQUEST).exists()
            if now != before:
                before, since = now, time.monotonic()
                if asked:
                    asked = requested = False
                    with suppress(OSError):
                        (self.directory / REQUEST).unlink()
            if answered and not requested:
                since = time.monotonic()  # another has seen progress
            still = time.monotonic() - since >= self.patience
            if still and not requested and not answered:
                asked = requested = self._ask()
            if requested and not answered:
                self._write()
                if asked:
                    self._tell()
            answered = requested

    def _position(self) -> tuple[Any, ...]:
        """Describe where the thread is, so that any progress is a difference."""
        frame, places = sys._current_frames().get(self.thread), []
        while frame is not None:
            places.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        return (*places, last_collective())

    def _ask(self) -> bool:
        """Ask all ranks to report; False if another has."""
        with suppress(OSError):
            self.directory.mkdir(exist_ok=True)
            (self.directory / REQUEST).touch(exist_ok=False)
            return True
        return False

    def _write(self) -> None:
        """Write this rank's report, and its place for the rank that has asked."""
        frames = sys._current_frames()
        place = place_of(self.rank, frames[self.thread]) if self.thread in frames else Place(self.rank, "", "its end")
        lines = [f"{datetime.now(UTC).isoformat(timespec='seconds')}: {place}", ""]
        lines += [f"last collective: {last_collective() or 'none'}", ""]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident in sorted(frames, key=lambda ident: ident != self.thread):
            if ident != threading.get_ident():
                lines += [f"{names.get(ident, 'a thread')}:", *traceback.format_stack(frames[ident])]
        with suppress(OSError):
            (self.directory / f"rank{self.rank}.txt").write_text("\n".join(lines) + "\n")
            part = self.directory / f".rank{self.rank}.json"
            part.write_text(json.dumps(asdict(place)))
            part.rename(self.directory / f"rank{self.rank}.json")

    def _tell(self) -> None:
        """Say where the ranks are, when all have answered, or had time to."""
        deadline, files = time.monotonic() + min(ANSWER_SECONDS, self.patience / 2), list[Path]()
        asked = (self.directory / REQUEST).stat().st_mtime_ns
        while time.monotonic() < deadline and len(files) < self.ranks and not self.ended.wait(0.05):
            files = [file for file in self.directory.glob("rank*.json") if file.stat().st_mtime_ns >= asked]
        places = []
        for file in files:
            with suppress(OSError, ValueError, TypeError, RecursionError):
                places.append(Place(**json.loads(file.read_text())))
        text = describe(places, self.ranks)
        print(
            f"warning: no progress for {self.patience:g} s: {text}; stacks: {self.directory}",
            file=sys.stderr,
            flush=True,
        )


def place_of(rank: int, frame: FrameType) -> Place:
    """Say where a rank is, by the innermost frame of its thread."""
    stack = traceback.extract_stack(frame)
    deepest = stack[-1]
    own = next((each for each in reversed(stack) if OWN in each.filename), deepest)
    waits = last_collective(only_unfinished=True)  # of NCCL, in which the host waits wherever it needs a result
    if not waits and any(part in deepest.filename for part in IN_COLLECTIVES):
        waits = last_collective() or "a collective"
    if waits:
        return Place(rank, waits, _shown(own))
    return Place(rank, "", _shown(own) if own is deepest else f"{_shown(own)} ({_shown(deepest)})")


def _shown(frame: traceback.FrameSummary) -> str:
    name = re.split("/site-packages/|/moefoundry/|/lib/python[^/]*/", frame.filename)[-1]
    return f"{name}:{frame.lineno}, in {frame.name}"


def describe(places: list[Place], ranks: int) -> str:
    """Group ranks by their places, with those first that are in no collective: the others wait for them."""
    groups: dict[Place, list[int]] = {}
    for place in sorted(places, key=lambda place: (bool(place.collective), place.rank)):
        groups.setdefault(replace(place, rank=0), []).append(place.rank)
    parts = [place.of(group) for place, group in groups.items()]
    if silent := sorted({*range(ranks)} - {place.rank for place in places}):
        parts.append(f"{numbers(silent)} did not answer")
    return "; ".join(parts)


def numbers(ranks: list[int]) -> str:
    """Write ranks as ``rank 3`` or ``ranks 0-2, 5``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    texts = [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
