"""Each tracker: how it is asked whether it can be used, and how its logger is built.

A function that builds gets the tracker's keys, ``run_dir``, and the tracker's name of the run to go on with, or None.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from composer.loggers import MLFlowLogger, WandBLogger
from composer.utils import dist

from moefoundry.callbacks.by_batch import ByBatch
from moefoundry.callbacks.destinations import Comet, LogFile, TensorBoard
from moefoundry.composer_patches import mlflow_run_id
from moefoundry.config import (
    CometConfig,
    FileLoggerConfig,
    MLflowConfig,
    TensorBoardConfig,
    UserError,
    WandbConfig,
    redacted,
)
from moefoundry.config.urls import is_url, resolved

PATIENCE = 10.0
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "comet": "comet_ml"}
"""Client packages; none is a dependency of this one."""


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


def comet(cfg: CometConfig, run_dir: Path, entry: str | None) -> ByBatch:
    """Build ``loggers.comet`` of a recipe."""
    logger = Comet(CometConfig(**redacted(asdict(cfg), "loggers.comet")), run_dir / "comet", entry)
    return ByBatch(logger, "loggers.comet", identity=lambda: logger.experiment_key or "")


def file_logger(cfg: FileLoggerConfig, run_dir: Path, entry: str | None) -> ByBatch:
    """Build ``loggers.file_logger`` of a recipe."""
    logger = LogFile(Path(resolved(cfg.filename)), continues=entry is not None)
    return ByBatch(logger, "loggers.file_logger", identity=lambda: cfg.filename)


def ask(name: str, cfg: Any) -> None:
    """Ask a tracker whether it can be used, without a change to anything; one rank calls it.

    Args:
        name: Its key in ``loggers``.
        cfg: Its keys.

    Raises:
        UserError: Its package is not installed, its server does not answer, or there is no login.
    """
    package = PACKAGES.get(name, "")
    if package and find_spec(package) is None:
        raise UserError(f"loggers.{name}: the package {package} is not installed; `pip install {package}`")
    if (question := _QUESTIONS.get(name)) is not None:
        question(cfg)


def _ask_wandb(cfg: WandbConfig) -> None:
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_DISABLED"):
        return
    offline = "WANDB_MODE=offline"
    _answers("loggers.wandb", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), f", or set {offline}")
    import wandb

    if not wandb.api.api_key:
        raise UserError(f"loggers.wandb: no login; run `wandb login`, or set WANDB_API_KEY, or {offline}")


def _ask_mlflow(cfg: MLflowConfig) -> None:
    if cfg.tracking_uri and cfg.tracking_uri.startswith(("http://", "https://")):
        _answers("loggers.mlflow", cfg.tracking_uri)


def _ask_comet(cfg: CometConfig) -> None:
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # it would change functions of torch
    import comet_ml

    settings, offline = comet_ml.get_config(), "COMET_START_ONLINE=false"
    if settings.get_bool(None, "comet.start.online", default=True) is False:
        return
    if not settings["comet.api_key"]:
        raise UserError(f"loggers.comet: no login; run `comet login`, or set COMET_API_KEY, or {offline}")
    _answers("loggers.comet", os.environ.get("COMET_URL_OVERRIDE", "https://www.comet.com"), f", or set {offline}")


_QUESTIONS: dict[str, Callable[[Any], None]] = {"wandb": _ask_wandb, "mlflow": _ask_mlflow, "comet": _ask_comet}


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


def mlflow_uri(uri: str | None, run_dir: Path) -> str:
    """Give MLflow's place of runs as it wants it: a path becomes a URL, whatever letters it has."""
    place = str(run_dir / "mlruns") if uri is None else resolved(uri)
    return place if is_url(place) or place == "databricks" else Path(place).resolve().as_uri()


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
