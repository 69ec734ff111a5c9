"""``loggers: {metrics_file: {run_dir: ...}}`` of a recipe of LLM Foundry, found by this package's entry points."""

from __future__ import annotations

from pathlib import Path

from composer.core import State
from composer.loggers import Logger

from moefoundry.callbacks.metrics_file import MetricsFile


class FoundryMetricsFile(MetricsFile):
    """``run_dir/metrics.jsonl``: a line for each batch, as runs of this project write it; a resume goes on with it."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(Path(run_dir))

    def fit_start(self, state: State, logger: Logger) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.begin(state.timestamp.batch.value)
