"""Loggers of trackers that Composer has none for, or none that goes on with the entry of a run that resumes.

All of them write from rank 0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from moefoundry.config import CometConfig, TensorBoardConfig
from moefoundry.config.urls import resolved


class TensorBoard(LoggerDestination):
    """Event files in ``log_dir/run_name``: one entry, whatever is logged, and however often a run resumes."""

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


class Comet(LoggerDestination):
    """An experiment of Comet.

    Nothing is logged but metrics and the recipe: no code, no console, no environment.

    Args:
        cfg: ``loggers.comet`` of the recipe.
        directory: Place of the archives of an experiment that is offline, one in a directory of its own for each start.
            Comet names them by Python's random numbers, which a resume repeats.
        entry: Key of the experiment to go on with; None begins one, or takes that of ``COMET_EXPERIMENT_KEY``.

    Attributes:
        experiment_key: Comet's name of the experiment, once it has begun.
    """

    def __init__(self, cfg: CometConfig, directory: Path, entry: str | None) -> None:
        self.cfg = cfg
        self.directory = directory
        self.experiment_key = entry
        self._experiment: Any = None

    def init(self, state: State, logger: Logger) -> None:
        """Begin, or go on.

        Raises:
            RuntimeError: Comet does not take the experiment.
        """
        if dist.get_global_rank() != 0:
            return
        import comet_ml

        cfg = self.cfg
        off = dict.fromkeys(
            ("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details"), False
        )
        off |= dict.fromkeys(
            ("auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_log_co2"), False
        )
        earlier = [int(path.name) for path in self.directory.glob("*") if path.name.isdecimal()]
        place = self.directory / str(max(earlier, default=0) + 1)
        place.mkdir(parents=True)
        config = comet_ml.ExperimentConfig(
            name=cfg.name, tags=cfg.tags, offline_directory=str(place), display_summary_level=0, **off
        )
        experiment = comet_ml.start(
            workspace=cfg.workspace,
            project_name=cfg.project,
            experiment_key=self.experiment_key,
            experiment_config=config,
        )
        if not experiment.alive:
            raise RuntimeError("Comet does not take the experiment")
        self._experiment, self.experiment_key = experiment, experiment.get_key()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._experiment is not None:
            self._experiment.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._experiment is not None:
            self._experiment.log_parameters(hyperparameters)

    def post_close(self) -> None:
        if self._experiment is not None:
            self._experiment.end()


class LogFile(LoggerDestination):
    """Lines of text: ``[hyperparameter]: NAME: VALUE`` and ``[metric][batch=N]: NAME: VALUE``.

    Args:
        path: The file.
        continues: The run goes on with the file: the lines of batches that are trained again are dropped.
    """

    def __init__(self, path: Path, continues: bool) -> None:
        self.path = path
        self.continues = continues
        self._file: TextIO | None = None

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        kept = ""
        if self.continues and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = "".join(
                line for line in lines if line.endswith("\n") and _batch(line) <= state.timestamp.batch.value
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if kept:
            fresh = self.path.with_name(f".{self.path.name}")
            fresh.write_text(kept)
            fresh.replace(self.path)
        self._file = self.path.open("a" if kept else "w", buffering=1)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._file is not None:
            self._file.writelines(f"[metric][batch={step}]: {name}: {float(v)}\n" for name, v in metrics.items())

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.writelines(f"[hyperparameter]: {name}: {value!r}\n" for name, value in hyperparameters.items())

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _batch(line: str) -> int:
    """Read the batch of a line; 0 where it is of none."""
    match = re.match(r"\[metric\]\[batch=(\d+)\]", line)
    return int(match[1]) if match else 0
