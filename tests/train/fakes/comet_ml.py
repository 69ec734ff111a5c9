"""As much of Comet's client as a run uses; its "archives" are JSON files in the offline directory.

The real client (3.58) is not installed where tests run: it pins old versions of its dependencies.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class ExperimentConfig(SimpleNamespace):
    """Options by name."""


class _Settings(dict[str, Any]):
    def get_bool(self, value: bool | None, name: str, default: bool) -> bool:
        return {"true": True, "false": False}.get(os.environ.get("COMET_START_ONLINE", ""), default)


def get_config() -> _Settings:
    return _Settings({"comet.api_key": os.environ.get("COMET_API_KEY")})


class _Experiment:
    alive = True

    def __init__(self, key: str, options: ExperimentConfig) -> None:
        self.key, self.options = key, options
        self.parameters: dict[str, Any] = {}
        self.metrics: list[tuple[int, str, float]] = []

    def get_key(self) -> str:
        return self.key

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        self.parameters |= parameters

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics += [(step, name, value) for name, value in metrics.items()]

    def end(self) -> None:
        directory = Path(self.options.offline_directory)
        content = vars(self.options) | {"parameters": self.parameters, "metrics": self.metrics}
        (directory / f"{self.key}.json").write_text(json.dumps(content))  # it replaces one of this name


def start(
    workspace: str | None, project_name: str | None, experiment_key: str | None, experiment_config: ExperimentConfig
) -> _Experiment:
    assert not get_config().get_bool(None, "comet.start.online", True), "tests have no network"
    return _Experiment(experiment_key or uuid.uuid4().hex, experiment_config)
