"""The mappings of a recipe beside ``model``; see :mod:`moefoundry.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import DURATION, MAX_FACTOR, MAX_SEED, REQUIRED, SPLIT, TAG, TEXT, key

# ------------------------------------------------------------------------------------------------- mesh and precision


@dataclass
class MeshConfig:
    replicate: int = key(
        1,
        "Copies of the sharded model; -1 is what world size and shard leave.",
        ge=-1,
        renamed_from=("data_parallel_replicate_degree", "dp_replicate"),
    )
    shard: int = key(
        -1,
        "Ranks that share one copy; -1 is what world size and replicate leave.",
        ge=-1,
        renamed_from=("data_parallel_shard_degree", "dp_shard"),
    )
    expert: int = key(
        1,
        "Ranks that share the experts; divides shard.",
        ge=1,
        renamed_from=("expert_parallel_degree", "moe_world_size"),
    )
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
    compute: Compute = key(
        Compute.fp32,
        "Operands of the matrix products; master weights are always fp32.",
        renamed_from=("precision", "mixed_precision", "mixed_precision_param", "torch_dtype", "dtype"),
        other_values={"amp_bf16": "bf16", "bfloat16": "bf16", "float32": "fp32"},
    )
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
        "${train_loader.dataset.local}/tokenizer",
        "A Hugging Face tokenizer directory.",
        path=True,
        free_on_resume=True,
        renamed_from=("tokenizer", "tokenizer_name", "tokenizer_path", "hf_assets_path"),
    )


@dataclass
class DatasetConfig:
    local: str = key(
        "data/quickstart",
        "Directory written by `moefoundry prepare`.",
        path=True,
        free_on_resume=True,
        renamed_from=("data_local", "dataset_path"),
    )
    remote: str | None = key(
        None,
        "Where missing shards are downloaded from; a URL or a path.",
        path=True,
        free_on_resume=True,
        renamed_from=("data_remote",),
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
    dataset: DatasetConfig = key(
        DatasetConfig,
        "What is read.",
        instead_of={"eval_subset_num_batches": "all of eval_loader is evaluated; fewer samples are another split"},
    )
    drop_last: bool = key(True, "Drop the last incomplete batch.")
    num_workers: int = key(
        0,
        "Loader processes of each rank.",
        ge=0,
        le=1024,
        free_on_resume=True,
        renamed_from=("dataloader_num_workers",),
    )


def held_out_loader() -> LoaderConfig:
    return LoaderConfig(dataset=_eval_dataset(), drop_last=False)


@dataclass
class OptimizerConfig:
    """What every optimizer has; the keys of an optimizer are in its subclass."""

    name: str = key(
        "adamw",
        "Optimizer; it decides the other keys of this mapping.",
        table="optimizers",
        renamed_from=("optimizer",),
        other_values={"decoupled_adamw": "adamw", "AdamW": "adamw", "adamw_torch": "adamw"},
    )
    lr: float = key(4.0e-3, "Peak learning rate.", gt=0, renamed_from=("learning_rate",))


@dataclass
class AdamWConfig(OptimizerConfig):
    betas: list[float] = key(
        lambda: [0.9, 0.95],
        "Decay of the first and second moment.",
        ge=0,
        lt=1,
        length=2,
        instead_of={
            "adam_beta1": "both are given as optimizer.betas=[0.9, 0.95]",
            "adam_beta2": "both are given as optimizer.betas=[0.9, 0.95]",
            "beta1": "both are given as optimizer.betas=[0.9, 0.95]",
            "beta2": "both are given as optimizer.betas=[0.9, 0.95]",
        },
    )
    eps: float = key(1.0e-8, "Added to the root of the second moment.", gt=0, renamed_from=("adam_epsilon",))
    weight_decay: float = key(0.1, "Decoupled decay of weight matrices (not norms, biases, embeddings).", ge=0)


class ScheduleTiming(StrEnum):
    batch_end = "batch_end"
    composer = "composer"


@dataclass
class SchedulerConfig:
    """Keys that every schedule has; the keys of one schedule are in its subclass."""

    name: str = key(
        "cosine_with_warmup",
        "Schedule; it decides the other keys of this mapping.",
        table="schedulers",
        renamed_from=("scheduler", "lr_scheduler_type"),
        other_values={"linear": "linear_decay_with_warmup", "constant": "constant_with_warmup"},
    )
    timing: ScheduleTiming = key(
        ScheduleTiming.batch_end,
        "Where in the schedule a batch is: at its own end, or two batches before, as in Composer and LLM Foundry.",
        free_on_resume=True,
    )


@dataclass
class WarmupConfig(SchedulerConfig):
    """Keys of a schedule that begins with a linear warm-up."""

    t_warmup: str = key(
        "0.3dur",
        "Linear warm-up.",
        pattern=DURATION,
        instead_of={
            "warmup_steps": "a duration has a unit: scheduler.t_warmup=100ba",
            "warmup_ratio": "a part of the run is scheduler.t_warmup=0.05dur",
        },
    )


@dataclass
class ConstantWithWarmupConfig(WarmupConfig):
    name: str = key("constant_with_warmup", "Schedule; it decides the other keys of this mapping.", table="schedulers")


@dataclass
class CosineWithWarmupConfig(WarmupConfig):
    alpha_f: float = key(
        0.1,
        "Final learning rate as a fraction of the peak.",
        ge=0,
        le=1,
        renamed_from=("min_lr_factor", "min_lr_ratio"),
    )


@dataclass
class LinearDecayWithWarmupConfig(WarmupConfig):
    name: str = key(
        "linear_decay_with_warmup", "Schedule; it decides the other keys of this mapping.", table="schedulers"
    )
    alpha_f: float = key(0.0, "Final learning rate as a fraction of the peak.", ge=0, le=1)


class ClippingType(StrEnum):
    norm = "norm"


@dataclass
class GradientClippingConfig:
    clipping_type: ClippingType = key(ClippingType.norm, "How gradients are clipped.")
    clipping_threshold: float = key(
        1.0, "Largest global gradient norm.", gt=0, renamed_from=("max_norm", "max_grad_norm", "grad_clip")
    )


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
    wandb: WandbConfig | None = key(
        None, "Weights & Biases (offline with WANDB_MODE=offline).", renamed_from=("enable_wandb",)
    )
    tensorboard: TensorBoardConfig | None = key(None, "TensorBoard.", renamed_from=("enable_tensorboard",))
    mlflow: MLflowConfig | None = key(None, "MLflow.")


@dataclass
class LossConfig:
    """Keys that every further loss has; the keys of one loss are in its subclass."""

    weight: float = key(REQUIRED, "Multiplies the loss in the total; may be negative.", ge=-MAX_FACTOR, le=MAX_FACTOR)


@dataclass
class LossesConfig:
    logits_z: LossConfig | None = key(
        None, "Mean squared logsumexp of the output logits, which keeps them small (PaLM: weight 1.0e-4)."
    )
    router_entropy: LossConfig | None = key(
        None, "Mean entropy of the routers' scores, summed over MoE layers; a negative weight is a bonus."
    )
