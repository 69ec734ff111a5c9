"""The recipe's ``callbacks`` and ``loggers``."""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config.field import TAG, TEXT, key


@dataclass
class SpeedMonitorConfig:
    """Tokens per second."""

    window_size: int = key(10, "Batches over which the throughput is averaged.", ge=1)


@dataclass
class LRMonitorConfig:
    """Learning rate."""


@dataclass
class MemoryMonitorConfig:
    """Peak memory."""


@dataclass
class ReportConfig:
    """Report at the end of a run."""

    prompt: str | None = key(
        None,
        "Text that the trained model continues at the end of the run; null for none.",
        pattern=TEXT,
    )
    max_new_tokens: int = key(48, "Tokens of the continuation.", ge=0)


@dataclass
class CallbacksConfig:
    """Monitors."""

    speed_monitor: SpeedMonitorConfig | None = key(SpeedMonitorConfig, "Tokens per second.")
    lr_monitor: LRMonitorConfig | None = key(LRMonitorConfig, "Learning rate.")
    memory_monitor: MemoryMonitorConfig | None = key(MemoryMonitorConfig, "Peak memory of device and host.")
    report: ReportConfig | None = key(ReportConfig, "Plots, a completion and the resume command at the end.")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    project: str | None = key(None, "Project.", pattern=TEXT, renamed_from=("wandb_project",))
    entity: str | None = key(None, "User or team.", pattern=TEXT)
    group: str | None = key(None, "Group of runs.", pattern=TEXT)
    name: str | None = key("${run_name}", "Run name.", pattern=TEXT)
    tags: list[str] = key(list, "Tags.", pattern=TAG)


@dataclass
class TensorBoardConfig:
    """TensorBoard."""

    log_dir: str = key("${run_dir}/tensorboard", "Where event files go.", path=True, renamed_from=("tensorboard_dir",))
    flush_interval: int = key(100, "Values between two flushes.", ge=1)


@dataclass
class MLflowConfig:
    """MLflow."""

    experiment_name: str = key("moefoundry", "Experiment.", pattern=TEXT)
    run_name: str | None = key("${run_name}", "Run name.", pattern=TEXT)
    tracking_uri: str | None = key(None, "Server or store, a URL or a path; null is ${run_dir}/mlruns.", path=True)


@dataclass
class LoggersConfig:
    """Trackers of metrics."""

    wandb: WandbConfig | None = key(
        None, "Weights & Biases (offline with WANDB_MODE=offline).", renamed_from=("enable_wandb",)
    )
    tensorboard: TensorBoardConfig | None = key(None, "TensorBoard.", renamed_from=("enable_tensorboard",))
    mlflow: MLflowConfig | None = key(None, "MLflow.")
