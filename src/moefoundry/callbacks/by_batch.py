"""One axis for all trackers: the number of the batch, 1-based, as in ``metrics.jsonl``.

Composer logs losses before it counts their batch, and other metrics after; so here all that was measured in a batch is
handed on when it ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from composer.core import Event, State
from composer.loggers import Logger, LoggerDestination

from moefoundry.config import UserError
from moefoundry.config.secrets import redact
from moefoundry.data.stores import one_line

ENDS = (Event.BATCH_CHECKPOINT, Event.EVAL_AFTER_ALL, Event.FIT_END)
"""Events at which every metric of a batch is known, but for an evaluation that follows the last batch."""


class ByBatch(LoggerDestination):
    """Hands the metrics of a batch to a tracker at once, under the batch's number.

    A tracker that fails while the run trains is named once, and gets nothing more: the run goes on without it.

    Args:
        tracker: Logger of the tracker.
        key: Key of the recipe, for messages.
        entry: Environment variable that names an entry to go on with, and its value. Such an entry has its
            hyperparameters, and MLflow refuses those that a resume has changed.
        identity: Gives the tracker's name of the run, once it has begun; empty where that is the run's own name.
    """

    def __init__(
        self,
        tracker: LoggerDestination,
        key: str,
        entry: dict[str, str] | None = None,
        identity: Callable[[], str] = str,
    ) -> None:
        self.tracker = tracker
        self.key = key
        self.entry = entry or {}
        self.identity = identity
        self.lost = False
        self._pending: dict[str, Any] = {}

    def start(self, state: State, logger: Logger) -> None:
        """Begin to log; every rank calls it.

        Raises:
            UserError: The tracker refuses.
        """
        os.environ |= self.entry
        try:
            self.tracker.run_event(Event.INIT, state, logger)
        except Exception as error:  # each client has its own
            raise UserError(f"{self.key}: cannot be used: {one_line(error)}") from error
        finally:
            for name in self.entry:  # another run of this process has an entry of its own
                del os.environ[name]

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in ENDS and self._pending:
            self._unless_lost(self.tracker.log_metrics, self._pending, state.timestamp.batch.value)
            self._pending = {}
        self._unless_lost(self.tracker.run_event, event, state, logger)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._pending.update(metrics)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if not self.entry:
            self._unless_lost(self.tracker.log_hyperparameters, hyperparameters)

    def close(self, state: State, logger: Logger) -> None:
        self._unless_lost(self.tracker.close, state, logger)

    def post_close(self) -> None:
        self._unless_lost(self.tracker.post_close)

    def _unless_lost(self, call: Callable[..., None], *args: Any) -> None:
        if self.lost:
            return
        try:
            call(*args)
        except Exception as error:  # each client has its own
            self.lost = True
            text = f"warning: {self.key}: lost: {redact(one_line(error))}; metrics.jsonl has all metrics"
            print(text, file=sys.stderr, flush=True)
