"""The live view of a run on the terminal that trains it: the one of ``moefoundry watch``, from the same files."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from rich.console import Console

from moefoundry.callbacks.signals import StopOnSignal
from moefoundry.runs.live import Drawing, can_draw
from moefoundry.runs.watching import Watched

SECONDS = 0.5  # between two drawings, at least


class LiveView(LoggerDestination):
    """Draws the run after its batches; for rank 0.

    It comes after the logger that writes ``metrics.jsonl``.

    Args:
        run_dir: Directory of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._drawn_at = 0.0
        self._shown = ExitStack()

    def fit_start(self, state: State, logger: Logger) -> None:
        self._run = Watched(self.run_dir)
        self._drawing = self._shown.enter_context(Drawing([self._run], Console(stderr=True)))
        self._shown.callback(self._look)  # the end of the run is in the last state that is drawn

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if any(isinstance(callback, StopOnSignal) and callback.stopped_by for callback in state.callbacks):
            self._drawing.let_go()  # the launcher has said that it got the signal, or the terminal has shown ^C
        elif time.monotonic() - self._drawn_at > SECONDS:
            self._look()

    def end(self) -> None:
        """Give the terminal back, with the last state of the run on it; nothing is done twice."""
        self._shown.close()

    def _look(self) -> None:
        self._drawn_at = time.monotonic()
        with suppress(OSError):  # a file that cannot be read now is no reason to end a run
            self._run.look()
            self._drawing.draw()


def has_its_own_terminal() -> bool:
    """Tell if rank 0 can draw on a terminal that no other rank writes to.

    All ranks call it, and get the same answer.
    """
    drawable = dist.get_global_rank() == 0 and can_draw(Console(stderr=True))
    ranks = dist.all_gather_object((drawable, _terminals()))
    (drawable, own), *others = ranks
    return drawable and not any(own & terminals for _, terminals in others)


def _terminals() -> set[tuple[str, int]]:
    """Host and device of each terminal that this process writes to."""
    files = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    return {(socket.gethostname(), os.fstat(file).st_rdev) for file in files}
