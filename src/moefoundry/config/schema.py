"""The recipe, typed at every depth. Its defaults *are* ``configs/quickstart.yaml`` (a test keeps them equal).

One dataclass for each mapping of the YAML; a parent never repeats a child's fields. ``key`` adds to a field what the
type cannot say: its documentation, its range, which of its values this release can run (``available``), whether a
resumed run may change it, what it is called elsewhere. The error messages, ``docs/recipe.md`` and the checks all come
from here and from :mod:`moefoundry.config.schema_model`. Units: sizes in tokens or elements, durations as Composer
time strings (``200ba``, ``1ep``, ``1000000tok``, ``512sp``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import (
    BATCHES,
    DURATION,
    INTERVAL,
    MAX_BATCH,
    MAX_SEED,
    MAX_TIMEOUT,
    NAME,
    SPLIT,
    TAG,
    TEXT,
    key,
)
from moefoundry.config.schema_model import ModelConfig

# ------------------------------------------------------------------------------------------------- mesh and precision


@dataclass
class MeshConfig:
    replicate: int = key(1, "Copies of the sharded model; -1 is what world size and shard leave.", ge=-1)
    shard: int = key(-1, "Ranks that share one copy; -1 is what world size and replicate leave.", ge=-1)
    expert: int = key(1, "Ranks that share the experts; divides shard.", ge=1)
    ranks_per_node: int | None = key(
        None, "Ranks of a node, which tokens for experts enter once; null asks the launcher.", ge=1
    )


class Compute(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    bf16_emulated = "bf16_emulated"


class Moments(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    bf16_stochastic = "bf16_stochastic"


class Fp8Recipe(StrEnum):
    tensorwise = "tensorwise"
    rowwise = "rowwise"
    deepseek_v3 = "deepseek_v3"


class Fp8Backend(StrEnum):
    reference = "reference"
    triton = "triton"


@dataclass
class Fp8Config:
    recipe: Fp8Recipe | None = key(None, "FP8 training recipe; null trains without FP8.")
    exclude: list[str] = key(
        lambda: ["lm_head", "*.router.gate"],
        "Modules, with all in them, whose products stay as precision.compute says; * stands for anything. The output "
        "head and the gates stay so in any case.",
    )
    backend: Fp8Backend | None = key(None, "What runs the FP8 products; null takes the kernels where they can run.")


@dataclass
class PrecisionConfig:
    compute: Compute = key(Compute.fp32, "Operands of the matrix products; master weights are always fp32.")
    optimizer_moments: Moments = key(Moments.fp32, "AdamW's moments; BF16 rounds to the nearest, or stochastically.")
    fp8: Fp8Config = key(Fp8Config, "FP8.")


class ActivationCheckpointing(StrEnum):
    none = "none"
    selective = "selective"
    full = "full"


@dataclass
class EmaConfig:
    decay: float = key(0.999, "Decay of the parameters' moving average.", gt=0, lt=1)
    evaluate: bool = key(False, "Evaluate the average in place of the trained parameters.")


# ------------------------------------------------------------------------------------------------------ data and loop


@dataclass
class TokenizerConfig:
    name: str = key(
        "${train_loader.dataset.local}/tokenizer", "A Hugging Face tokenizer directory.", path=True, free_on_resume=True
    )


@dataclass
class DatasetConfig:
    local: str = key("data/quickstart", "Directory written by `moefoundry prepare`.", path=True, free_on_resume=True)
    remote: str | None = key(
        None, "Where missing shards are downloaded from; a URL or a path.", path=True, free_on_resume=True
    )
    split: str = key("train", "Sub-directory of local and remote.", pattern=SPLIT, free_on_resume=True)
    shuffle: bool = key(True, "Shuffle samples.")
    shuffle_seed: int = key("${seed}", "Seed of the shuffle.", ge=0, le=MAX_SEED)
    max_seq_len: int = key("${max_seq_len}", "Tokens a sample; must be what the data were packed to.", ge=2)
    validate_hash: str | None = key(
        "xxh64",
        "Hash in the index that each shard is checked against before it is first read; null compares sizes.",
        free_on_resume=True,
    )


def _eval_dataset() -> DatasetConfig:
    return DatasetConfig(local="${train_loader.dataset.local}", split="val", shuffle=False)


@dataclass
class LoaderConfig:
    name: str = key("text", "Loader kind.", available=("text",))
    dataset: DatasetConfig = key(DatasetConfig, "What is read.")
    drop_last: bool = key(True, "Drop the last incomplete batch.")
    num_workers: int = key(0, "Loader processes of each rank.", ge=0, le=1024, free_on_resume=True)


def _eval_loader() -> LoaderConfig:
    return LoaderConfig(dataset=_eval_dataset(), drop_last=False)


@dataclass
class OptimizerConfig:
    name: str = key("adamw", "Optimizer.", available=("adamw",))
    lr: float = key(4.0e-3, "Peak learning rate.", gt=0)
    betas: list[float] = key(lambda: [0.9, 0.95], "Decay of the first and second moment.", ge=0, lt=1, length=2)
    eps: float = key(1.0e-8, "Added to the root of the second moment.", gt=0)
    weight_decay: float = key(0.1, "Decoupled decay of weight matrices (not norms, biases, embeddings).", ge=0)


class ScheduleTiming(StrEnum):
    batch_end = "batch_end"
    composer = "composer"


@dataclass
class SchedulerConfig:
    """What every schedule has; the keys of a schedule are in its subclass."""

    name: str = key("cosine_with_warmup", "Schedule; it decides the other keys of this mapping.")
    t_warmup: str = key("0.3dur", "Linear warm-up.", pattern=DURATION)
    timing: ScheduleTiming = key(
        ScheduleTiming.batch_end,
        "Where in the schedule a batch is: at its own end, or two batches before, as in Composer and LLM Foundry.",
    )


@dataclass
class ConstantWithWarmupConfig(SchedulerConfig):
    name: str = key("constant_with_warmup", "Schedule; it decides the other keys of this mapping.")


@dataclass
class CosineWithWarmupConfig(SchedulerConfig):
    alpha_f: float = key(0.1, "Final learning rate as a fraction of the peak.", ge=0, le=1)


@dataclass
class LinearDecayWithWarmupConfig(SchedulerConfig):
    name: str = key("linear_decay_with_warmup", "Schedule; it decides the other keys of this mapping.")
    alpha_f: float = key(0.0, "Final learning rate as a fraction of the peak.", ge=0, le=1)


SCHEDULERS: dict[str, type] = {
    "cosine_with_warmup": CosineWithWarmupConfig,
    "linear_decay_with_warmup": LinearDecayWithWarmupConfig,
    "constant_with_warmup": ConstantWithWarmupConfig,
}


class ClippingType(StrEnum):
    norm = "norm"


@dataclass
class GradientClippingConfig:
    clipping_type: ClippingType = key(ClippingType.norm, "How gradients are clipped.")
    clipping_threshold: float = key(1.0, "Largest global gradient norm.", gt=0)


class NonFinite(StrEnum):
    stop = "stop"
    skip = "skip"


@dataclass
class AlgorithmsConfig:
    gradient_clipping: GradientClippingConfig | None = key(GradientClippingConfig, "null does not clip.")


@dataclass
class SpeedMonitorConfig:
    window_size: int = key(10, "Batches over which the throughput is averaged.", ge=1)


@dataclass
class LRMonitorConfig:
    pass


@dataclass
class MemoryMonitorConfig:
    pass


@dataclass
class ReportConfig:
    prompt: str = key(
        "def is_valid(self, value):\n    if",
        "Text that the trained model continues at the end of the run.",
        pattern=TEXT,
    )
    max_new_tokens: int = key(48, "Tokens of the continuation.", ge=0)


@dataclass
class CallbacksConfig:
    speed_monitor: SpeedMonitorConfig | None = key(SpeedMonitorConfig, "Tokens per second.")
    lr_monitor: LRMonitorConfig | None = key(LRMonitorConfig, "Learning rate.")
    memory_monitor: MemoryMonitorConfig | None = key(MemoryMonitorConfig, "Peak memory of device and host.")
    report: ReportConfig | None = key(ReportConfig, "Plots, a completion and the resume command at the end.")


@dataclass
class WandbConfig:
    project: str | None = key(None, "Project.", pattern=TEXT)
    entity: str | None = key(None, "User or team.", pattern=TEXT)
    group: str | None = key(None, "Group of runs.", pattern=TEXT)
    name: str | None = key("${run_name}", "Run name.", pattern=TEXT)
    tags: list[str] = key(list, "Tags.", pattern=TAG)


@dataclass
class TensorBoardConfig:
    log_dir: str = key("${run_dir}/tensorboard", "Where event files go.", path=True)
    flush_interval: int = key(100, "Values between two flushes.", ge=1)


@dataclass
class MLflowConfig:
    experiment_name: str = key("moefoundry", "Experiment.", pattern=TEXT)
    run_name: str | None = key("${run_name}", "Run name.", pattern=TEXT)
    tracking_uri: str | None = key(None, "Server or store, a URL or a path; null is ${run_dir}/mlruns.", path=True)


@dataclass
class LoggersConfig:
    wandb: WandbConfig | None = key(None, "Weights & Biases (offline with WANDB_MODE=offline).")
    tensorboard: TensorBoardConfig | None = key(None, "TensorBoard.")
    mlflow: MLflowConfig | None = key(None, "MLflow.")


@dataclass
class Recipe:
    """One training run."""

    run_name: str = key("quickstart", "Name of the run.", pattern=NAME, free_on_resume=True)
    run_dir: str = key("runs/${run_name}", "Everything a run writes goes here.", path=True, free_on_resume=True)
    seed: int = key(17, "Seed of weights, shuffling and sampling.", ge=0, le=MAX_SEED)
    max_seq_len: int = key(512, "Tokens a sequence.", ge=2)
    model: ModelConfig = key(ModelConfig, "The model.")
    mesh: MeshConfig = key(MeshConfig, "The device mesh.", free_on_resume=True)
    precision: PrecisionConfig = key(PrecisionConfig, "Precision.")
    activation_checkpointing: ActivationCheckpointing = key(
        ActivationCheckpointing.none, "What the backward pass recomputes.", free_on_resume=True
    )
    compile: bool = key(False, "torch.compile of attention, router and dense feed-forward networks.")
    ema: EmaConfig | None = key(None, "Moving average of the parameters, in CPU memory.")
    tokenizer: TokenizerConfig = key(TokenizerConfig, "Tokenizer.")
    train_loader: LoaderConfig = key(LoaderConfig, "Training data.")
    eval_loader: LoaderConfig | None = key(_eval_loader, "Held-out data; null does not evaluate.")
    optimizer: OptimizerConfig = key(OptimizerConfig, "Optimizer.")
    scheduler: SchedulerConfig = key(CosineWithWarmupConfig, "Learning-rate schedule.", variants=SCHEDULERS, tag="name")
    algorithms: AlgorithmsConfig = key(AlgorithmsConfig, "Changes to the training loop.")
    nonfinite: NonFinite = key(
        NonFinite.stop,
        "A loss or gradient that is not finite stops the run before the update, or skips the step.",
        free_on_resume=True,
    )
    callbacks: CallbacksConfig = key(CallbacksConfig, "Monitors.", free_on_resume=True)
    loggers: LoggersConfig = key(LoggersConfig, "Where metrics go besides metrics.jsonl.", free_on_resume=True)
    max_duration: str = key("200ba", "Length of training.", pattern=INTERVAL, free_on_resume=True)
    eval_interval: str = key("100ba", "Time between evaluations.", pattern=INTERVAL, free_on_resume=True)
    global_train_batch_size: int = key(4, "Sequences of one optimizer step, over all ranks.", ge=1, le=MAX_BATCH)
    device_train_microbatch_size: int = key(
        2, "Sequences of one forward pass of one rank.", ge=1, le=MAX_BATCH, free_on_resume=True
    )
    device_eval_batch_size: int = key(
        4, "Sequences of one evaluation batch of one rank.", ge=1, le=MAX_BATCH, free_on_resume=True
    )
    save_interval: str = key("100ba", "Time between checkpoints.", pattern=INTERVAL, free_on_resume=True)
    save_async: bool = key(True, "Train on while a checkpoint is written; false waits for it.", free_on_resume=True)
    save_num_checkpoints_to_keep: int = key(2, "Newest checkpoints kept; -1 keeps all.", ge=-1, free_on_resume=True)
    save_keep_every: str | None = key(
        None, "Of each such span, the first checkpoint is kept for good.", pattern=BATCHES, free_on_resume=True
    )
    save_keep_best: str | None = key(
        None, "A loss of metrics.jsonl; the checkpoint where it was lowest is kept.", free_on_resume=True
    )
    save_remote: str | None = key(
        None,
        "Checkpoints are also uploaded to this URL, such as s3://bucket/run, or path.",
        path=True,
        free_on_resume=True,
    )
    load_path: str | None = key(
        None,
        "Checkpoint whose run is continued in this run_dir, from its batch on; may be a URL.",
        path=True,
        free_on_resume=True,
    )
    load_weights_only: bool = key(
        False,
        "Take the weights alone from load_path: counters, schedule, optimizer and data begin anew.",
        free_on_resume=True,
    )
    allow_batch_size_change: bool = key(
        False,
        "Resume with another global_train_batch_size, although the rest of the epoch is then drawn anew.",
        free_on_resume=True,
    )
    autoresume: bool = key(
        False, "Continue from the newest checkpoint of run_dir, if there is one.", free_on_resume=True
    )
    dist_timeout: float = key(
        600.0, "Seconds after which a collective gives up.", ge=1, le=MAX_TIMEOUT, free_on_resume=True
    )
    progress_bar: bool = key(True, "Progress bar on a terminal.", free_on_resume=True)
    log_to_console: bool = key(True, "Print metrics.", free_on_resume=True)
    console_log_interval: str = key("10ba", "Time between printed metrics.", pattern=INTERVAL, free_on_resume=True)
    icl_tasks: list[str] | None = key(None, "In-context tasks to evaluate.", available=(None,))
