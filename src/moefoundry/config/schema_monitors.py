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
class SystemMonitorConfig:
    """Load of hosts and GPUs."""

    every: int = key(10, "Batches from one measurement to the next.", ge=1)


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
    system_monitor: SystemMonitorConfig | None = key(None, "Load, memory and power of hosts and GPUs.")
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
class CometConfig:
    """Comet."""

    workspace: str | None = key(None, "Workspace.", pattern=TEXT)
    project: str | None = key(None, "Project.", pattern=TEXT, renamed_from=("comet_project_name",))
    name: str | None = key("${run_name}", "Name of the experiment.", pattern=TEXT)
    tags: list[str] = key(list, "Tags.", pattern=TAG)


_NO_CONSOLE = "loggers.file_logger has metrics and hyperparameters; the shell redirects the console"
_AT_ONCE = "loggers.file_logger writes each line at once"


@dataclass
class FileLoggerConfig:
    """Lines of text."""

    filename: str = key(
        "${run_dir}/log.txt",
        "The file, which rank 0 writes; a run that resumes goes on with it.",
        path=True,
        instead_of={
            "capture_stdout": _NO_CONSOLE,
            "capture_stderr": _NO_CONSOLE,
            "log_traces": _NO_CONSOLE,
            "remote_file_name": "loggers.file_logger.filename stays where it is; save_remote uploads checkpoints",
            "buffer_size": _AT_ONCE,
            "overwrite": "a run that resumes goes on with loggers.file_logger.filename, and any other replaces it",
        },
    )


@dataclass
class LoggersConfig:
    """Trackers of metrics."""

    wandb: WandbConfig | None = key(
        None, "Weights & Biases (offline with WANDB_MODE=offline).", renamed_from=("enable_wandb",)
    )
    tensorboard: TensorBoardConfig | None = key(None, "TensorBoard.", renamed_from=("enable_tensorboard",))
    mlflow: MLflowConfig | None = key(None, "MLflow.")
    comet: CometConfig | None = key(None, "Comet (offline with COMET_START_ONLINE=false).", renamed_from=("use_comet",))
    file_logger: FileLoggerConfig | None = key(None, "A file of lines.")
