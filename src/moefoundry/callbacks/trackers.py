"""Experiment trackers: Weights & Biases, TensorBoard, MLflow.

Each has one entry for a run, which a resume goes on with, and one axis: the number of the batch, 1-based, as in
``metrics.jsonl``. Composer logs losses before it counts their batch, and other metrics after; so here all that was
measured in a batch is handed on when it ends.

A tracker that cannot be used is named when the run starts, within :data:`PATIENCE` seconds.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from composer.core import Event, State
from composer.loggers import Logger, LoggerDestination, MLFlowLogger, WandBLogger
from composer.utils import dist

from moefoundry.checkpoint.remote import one_line
from moefoundry.composer_patches import mlflow_run_id
from moefoundry.config import LoggersConfig, MLflowConfig, TensorBoardConfig, UserError, WandbConfig, redacted
from moefoundry.config.making import chosen_parts, make_part
from moefoundry.config.urls import is_url, resolved

PATIENCE = 10.0
ENTRIES_FILE = "trackers.json"
ENDS = (Event.BATCH_CHECKPOINT, Event.EVAL_END, Event.FIT_END)
"""Events at which every metric of a batch is known, but for an evaluation that follows the last batch."""


class ByBatch(LoggerDestination):
    """Hands the metrics of a batch to a tracker at once, under the batch's number.

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
            self.tracker.log_metrics(self._pending, state.timestamp.batch.value)
            self._pending = {}
        self.tracker.run_event(event, state, logger)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._pending.update(metrics)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if not self.entry:
            self.tracker.log_hyperparameters(hyperparameters)

    def close(self, state: State, logger: Logger) -> None:
        self.tracker.close(state, logger)

    def post_close(self) -> None:
        self.tracker.post_close()


class TensorBoard(LoggerDestination):
    """Event files of rank 0 in ``log_dir/run_name``: one entry, whatever is logged, and however often a run resumes."""

    def __init__(self, cfg: TensorBoardConfig) -> None:
        self.cfg = cfg
        self._writer: Any = None

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            directory = Path(resolved(self.cfg.log_dir), state.run_name)
            first_batch = state.timestamp.batch.value + 1  # of another attempt, later ones are no longer shown
            self._writer = SummaryWriter(directory, purge_step=first_batch, max_queue=self.cfg.flush_interval)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Add hyperparameters to this entry; torch's ``add_hparams`` would make another."""
        if self._writer is not None:
            from torch.utils.tensorboard.summary import hparams

            plain = {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in hyperparameters.items()}
            for summary in hparams(plain, {}):
                self._writer.file_writer.add_summary(summary)

    def close(self, state: State, logger: Logger) -> None:
        if self._writer is not None:
            self._writer.close()


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


def wandb(cfg: WandbConfig, run_dir: Path, entry: str | None) -> ByBatch:
    """Build ``loggers.wandb`` of a recipe."""

    def identity() -> str:
        import wandb

        return wandb.run.id if wandb.run is not None else ""

    place = {"dir": str(run_dir), "resume": "allow"} | ({"id": entry} if entry else {})
    values = redacted(asdict(cfg), "loggers.wandb")
    return ByBatch(WandBLogger(**values, init_kwargs=place), "loggers.wandb", identity=identity)


def tensorboard(cfg: TensorBoardConfig, run_dir: Path, entry: str | None) -> ByBatch:
    """Build ``loggers.tensorboard`` of a recipe."""
    return ByBatch(TensorBoard(cfg), "loggers.tensorboard")


def mlflow(cfg: MLflowConfig, run_dir: Path, entry: str | None) -> ByBatch:
    """Build ``loggers.mlflow`` of a recipe."""
    uri = mlflow_uri(cfg.tracking_uri, run_dir)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{PATIENCE:.0f}")  # it would wait for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    options = {"tracking_uri": uri, "log_system_metrics": False}  # these would have an axis of their own
    logger = MLFlowLogger(cfg.experiment_name, cfg.run_name, **options)
    return ByBatch(logger, "loggers.mlflow", _mlflow_entry(uri, entry), lambda: mlflow_run_id(logger))


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


def try_trackers(cfg: LoggersConfig) -> None:
    """Ask each server whether it is there; one rank calls it.

    Raises:
        UserError: One is not.
    """
    uri = cfg.mlflow and cfg.mlflow.tracking_uri
    if uri and uri.startswith(("http://", "https://")):
        _answers("loggers.mlflow", uri)
    if cfg.wandb and os.environ.get("WANDB_MODE", "online") == "online" and not os.environ.get("WANDB_DISABLED"):
        url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        _answers("loggers.wandb", url, ", or set WANDB_MODE=offline")


def mlflow_uri(uri: str | None, run_dir: Path) -> str:
    """Give MLflow's place of runs as it wants it: a path becomes a URL, whatever letters it has."""
    place = str(run_dir / "mlruns") if uri is None else resolved(uri)
    return place if is_url(place) or place == "databricks" else Path(place).resolve().as_uri()


def _answers(key: str, url: str, remedy: str = "") -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        urllib.request.urlopen(
            parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), timeout=PATIENCE
        ).close()
    except urllib.error.HTTPError:
        pass  # which is an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{key}: {url} does not answer: {reason}; start it, or leave out {key}{remedy}") from error


def _mlflow_entry(uri: str, run_id: str | None) -> dict[str, str]:
    """Name the run for MLflow to go on with, if it still has it and the user names no other; on rank 0."""
    if run_id is None or "MLFLOW_RUN_ID" in os.environ or dist.get_global_rank() != 0:
        return {}
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        active = MlflowClient(uri).get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return {}
    return {"MLFLOW_RUN_ID": run_id} if active else {}


def _read_entries(run_dir: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        entries = json.loads((run_dir / ENTRIES_FILE).read_text())
        if isinstance(entries, dict):
            return {name: entry for name, entry in entries.items() if isinstance(entry, str) and entry}
    return {}
