"""Follow runs from their files until all of them have ended; the runs themselves notice nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moefoundry.config.secrets import redact
from moefoundry.runs.facts import RunFacts, RunState, add_lines, read_facts
from moefoundry.runs.metrics import EVAL_KEY, SPEED_KEY, Follower, Line
from moefoundry.runs.words import duration, shown_metrics

MAX_LINES = 400  # of the last batches, for the curve of the loss


class Watched:
    """A run that is followed.

    Args:
        run_dir: Its directory.

    Attributes:
        facts: State of the run.
        lines: Its last lines.
    """

    def __init__(self, run_dir: Path) -> None:
        self.facts: RunFacts = read_facts(run_dir)
        self.lines: deque[Line] = deque(maxlen=MAX_LINES)
        self._follower = Follower(run_dir)
        self._said: RunState | None = None

    @property
    def running(self) -> bool:
        return self.facts.state is RunState.running

    @property
    def name(self) -> str:
        return redact(self.facts.name)

    def look(self) -> list[Line]:
        """Read what is new. Returns the new lines."""
        new = self._follower.new_lines()
        if new and self.lines and new[0]["batch"] <= self.lines[-1]["batch"]:
            self.lines.clear()  # a resumed run
        self.lines.extend(new)
        known = len(self.facts.events)
        add_lines(self.facts, new)
        if not self.facts.recipe or len(self.facts.events) != known:  # it has just begun, perhaps with changed keys
            self.facts = read_facts(self.facts.path)
        return new

    def seconds_left(self) -> float | None:
        """Estimate the time to the last batch by the tokens a second, without evaluations and checkpoints."""
        whole, speed = self.facts.max_batches, self.facts.number(SPEED_KEY)
        rows, length = (self.facts.recipe.get(key) for key in ("global_train_batch_size", "max_seq_len"))
        if whole is None or not speed or not isinstance(rows, int) or not isinstance(length, int):
            return None
        return max(0, whole - self.facts.batch) * rows * length / speed

    def plain_lines(self, new: Sequence[Line]) -> Iterator[str]:
        """Yield lines for a log: each evaluation, the last of the new batches, and a change of the state."""
        for line in new:
            if EVAL_KEY in line:
                yield f"{self.name}: batch {line['batch']}: held-out loss {line[EVAL_KEY]:.4f} nats/token"
        if new:
            whole = self.facts.max_batches
            batch = f"batch {new[-1]['batch']}" + (f"/{whole}" if whole is not None else "")
            left = self.seconds_left() if self.running else None
            more = [f"{duration(left)} left"] if left else []
            yield "  ".join([f"{self.name}: {batch}", *shown_metrics(new[-1]), *more])
        if self.facts.state is not self._said:
            self._said = self.facts.state
            reason = f": {redact(self.facts.reason)}" if self.facts.reason and not self.running else ""
            yield f"{self.name}: {self.facts.state}{reason}"


def follow(runs: Sequence[Watched], seconds: float, show: Callable[[Watched, list[Line]], None]) -> None:
    """Look at runs again and again, until none is running any more.

    Args:
        runs: Runs to follow.
        seconds: Time between two looks.
        show: Called for each run after each look, with its new lines.
    """
    while True:
        for run in runs:
            show(run, run.look())
        if not any(run.running for run in runs):
            return
        time.sleep(seconds)


def print_lines(run: Watched, new: list[Line]) -> None:
    """Print what is new of a run, as lines; for :func:`follow`."""
    for line in run.plain_lines(new):
        print(line, flush=True)
