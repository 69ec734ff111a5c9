"""Experiment trackers of a run: Weights & Biases, TensorBoard, MLflow, Comet, a file of lines, and installed ones.

Each has one entry for a run, which a resume goes on with, and one axis (``by_batch.py``). A tracker that cannot be used
is named when the run starts, within seconds (``tracker_clients.py``).
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import dist

from moefoundry.callbacks.by_batch import ByBatch
from moefoundry.callbacks.tracker_clients import ask
from moefoundry.config import LoggersConfig
from moefoundry.config.making import chosen_parts, make_part

ENTRIES_FILE = "trackers.json"


def try_trackers(cfg: LoggersConfig) -> None:
    """Ask each tracker whether it can be used; one rank calls it.

    Raises:
        UserError: One cannot.
    """
    for name, part in chosen_parts("loggers", cfg):
        ask(name, part)


def build_trackers(cfg: LoggersConfig, run_dir: Path, continues: bool) -> list[ByBatch]:
    """Build the recipe's trackers; every rank calls it.

    Args:
        cfg: ``loggers`` of the recipe.
        run_dir: Directory of their files, and of the note of the run's entries.
        continues: True if the run goes on with ``run_dir``, and so with its entries.

    Raises:
        UserError: A tracker refuses, or is not installed.
    """
    entries = _read_entries(run_dir) if continues else {}
    trackers: list[ByBatch] = []
    for name, part in chosen_parts("loggers", cfg):
        key = f"loggers.{name}"
        tracker = make_part("loggers", name, key, part, run_dir, entries.get(name))
        trackers.append(tracker if isinstance(tracker, ByBatch) else ByBatch(tracker, key))
    return trackers


def start_trackers(trackers: list[ByBatch], state: State, logger: Logger) -> None:
    """Let trackers see a run from here on; every rank calls it.

    Raises:
        UserError: One refuses.
    """
    for tracker in trackers:
        tracker.start(state, logger)
        logger.destinations = (*logger.destinations, tracker)
        state.callbacks.append(tracker)
        tracker.run_event(Event.AFTER_LOAD, state, logger)


def note_entries(trackers: list[ByBatch], run_dir: Path) -> None:
    """Write down the trackers' names of the run, for a resume."""
    if dist.get_global_rank() == 0 and trackers:
        entries = {tracker.key.removeprefix("loggers."): tracker.identity() for tracker in trackers}
        (run_dir / ENTRIES_FILE).write_text(json.dumps(entries) + "\n")


def _read_entries(run_dir: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        entries = json.loads((run_dir / ENTRIES_FILE).read_text())
        if isinstance(entries, dict):
            return {name: entry for name, entry in entries.items() if isinstance(entry, str) and entry}
    return {}
