"""Lines for people while a run trains: one an interval, and one an evaluation."""

from __future__ import annotations

import sys
from typing import Any

from composer.core import State, Time
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from moefoundry.runs.words import shown_metrics


class Console(LoggerDestination):
    """Prints to standard error, from rank 0.

    Args:
        title: Printed when training begins; may be empty.
        interval: Time between two lines (``10ba``, ``1ep``), besides those of the first batch and of the last; None
            prints only evaluations.
    """

    def __init__(self, title: str, interval: str | None) -> None:
        self.title = title
        self.interval = None if interval is None else Time.from_timestring(interval)
        self._metrics: dict[str, Any] = {}
        self._start = ""

    def log_traces(self, traces: dict[str, Any]) -> None:
        self._start = traces.get("start", self._start)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._metrics.update(metrics)
        if parts := {name: seconds for name, seconds in metrics.items() if name.startswith("resume/")}:
            self._print(format_start_line(self._start, parts))

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.title:
            self._print(self.title)

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None, "training has begun"
        if self.interval is None or state.previous_timestamp is None:
            return
        unit, step = self.interval.unit, self.interval.value
        before, now = state.previous_timestamp.get(unit).value, state.timestamp.get(unit).value
        ends = state.timestamp.batch.value == 1 or state.timestamp >= state.max_duration
        if ends or now // step > before // step:
            self._print(format_train_line(state, self._metrics))

    def eval_end(self, state: State, logger: Logger) -> None:
        name = f"metrics/{state.dataloader_label}/LanguageCrossEntropy"
        if name in self._metrics:
            self._print(
                f"batch {state.timestamp.batch.value}: held-out loss {float(self._metrics[name]):.4f} nats/token"
            )

    def _print(self, line: str) -> None:
        if dist.get_global_rank() == 0:
            print(line, file=sys.stderr, flush=True)


def format_start_line(start: str, parts: dict[str, float]) -> str:
    """Format ``resumed from runs/mine/checkpoints/ba6 (batch 6) in 2.1 s: store 1.2 s, exchange 0.3 s ...``."""
    texts = [
        f"{name.removeprefix('resume/').removesuffix('_seconds').replace('_', ' ')} {seconds:.1f} s"
        for name, seconds in parts.items()
    ]
    return f"{start} in {sum(parts.values()):.1f} s: {', '.join(texts)}"


def format_train_line(state: State, metrics: dict[str, Any]) -> str:
    """Format ``batch 10/200  loss 6.1234  balance 0.0512 ...``, with the metrics known at the end of a batch."""
    duration = state.max_duration
    assert duration is not None
    parts = [f"batch {state.timestamp.batch.value}"]
    parts[0] += f"/{duration.value}" if duration.unit.value == "ba" else f" of {duration.to_timestring()}"
    return "  ".join([*parts, *shown_metrics(metrics)])
