"""Preemption: a signal to any rank makes all ranks stop after the same batch, with a checkpoint of it.

SIGTERM is what launchers, Kubernetes and Slurm send before they kill; SIGUSR1 is what ``sbatch --signal=USR1@120`` asks
Slurm for; SIGINT is Ctrl-C. All mean the same. Ranks must not save by themselves when a signal comes: a save is
collective, and the others may be a batch behind. So a signal only leaves a note, and ranks compare notes at the end of
each batch.
"""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from moefoundry.data.loader import STOP_SIGNALS

REPEAT_SECONDS = 5.0
"""A signal to a process group reaches a rank twice: at once, and passed on by its launcher, which got it too. Only one
that comes later than this after the first is a second request."""


class StopOnSignal(Callback):
    """Ends training after the batch in which any rank got a signal; the end of training saves, as it always does.

    A second signal ends the rank at once, with the signal's own status.

    Attributes:
        stopped_by: The signal that ended training on all ranks; None where training goes on, or had just reached its
            end by itself.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._received: int = 0
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self._previous = {signum: signal.signal(signum, self._note) for signum in STOP_SIGNALS}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        received = state.device.tensor_to_device(torch.tensor(self._received))
        dist.all_reduce(received, reduce_operation="MAX")
        assert state.max_duration is not None, "training has begun"
        if received and state.timestamp < state.max_duration:
            self.stopped_by = signal.Signals(int(received))
            state.evaluators = []  # no time is left for the evaluation that ends a run
            state.stop_training()

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.stopped_by is None:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    def post_close(self) -> None:
        """Ignore further signals, with which a launcher would change the status of ranks that have saved everything."""
        if self.stopped_by is not None:
            for signum in STOP_SIGNALS:
                signal.signal(signum, signal.SIG_IGN)

    def _note(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self._received and now - self._received_at > REPEAT_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        elif not self._received:
            self._received, self._received_at = signum, now
