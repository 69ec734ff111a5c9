"""The mappings of a recipe beside ``model``; see :mod:`moefoundry.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from moefoundry.config.field import DURATION, MAX_FACTOR, MAX_SEED, REQUIRED, SPLIT, key
from moefoundry.config.schema_data import FimConfig, PackingConfig, StreamConfig

# ------------------------------------------------------------------------------------------------- mesh and precision


class Gather(StrEnum):
    """Passes for which sharded parameters are gathered."""

    each_pass = "each_pass"
    each_step = "each_step"


class Reduce(StrEnum):
    """Backward passes behind which gradients are reduced to shards."""

    each_micro_batch = "each_micro_batch"
    each_step = "each_step"


@dataclass
class MeshConfig:
    """Degrees of the device mesh, and how FSDP works on it."""

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
        renamed_from=("expert_parallel_degree", "moe_world_size", "expert_model_parallel_size"),
    )
    ranks_per_node: int | None = key(
        None, "Ranks of a node, which tokens for experts enter once; null asks the launcher.", ge=1
    )
    gather: Gather = key(
        Gather.each_pass,
        "When parameters are gathered: each_pass, block by block, forward and again backward; each_step, once for all "
        "micro-batches of a step, and every rank holds all of them in the compute dtype.",
        instead_of={
            "reshard_after_forward": "mesh.gather=each_step keeps parameters whole from pass to pass (false there)",
        },
    )
    reduce: Reduce = key(
        Reduce.each_micro_batch,
        "When gradients are reduced: behind each micro-batch; or once, behind the last of a step, and every rank adds "
        "up all of them in fp32.",
    )


class Compute(StrEnum):
    """Operands of the matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"
    bf16_emulated = "bf16_emulated"


class Moments(StrEnum):
    """Formats of AdamW's moments."""

    fp32 = "fp32"
    bf16 = "bf16"
    bf16_stochastic = "bf16_stochastic"


class Fp8Recipe(StrEnum):
    """FP8 training recipes."""

    tensorwise = "tensorwise"
    rowwise = "rowwise"
    deepseek_v3 = "deepseek_v3"


class Fp8Backend(StrEnum):
    """Implementations of the FP8 products."""

    reference = "reference"
    triton = "triton"
    deepgemm = "deepgemm"


@dataclass
class Fp8Config:
    """FP8 training."""

    recipe: Fp8Recipe | None = key(None, "FP8 training recipe; null trains without FP8.")
    exclude: list[str] = key(
        lambda: ["lm_head", "*.router.gate"],
        "Modules, with all in them, whose products stay as precision.compute says; * stands for anything. The output "
        "head and the gates stay so in any case.",
    )
    backend: Fp8Backend | None = key(
        None,
        "What runs the FP8 products; null takes the kernels where they can run; deepgemm is for those of experts, and "
        "needs the package of that name.",
    )
    fsdp_all_gather: bool = key(
        False,
        "FSDP quantizes shards once a step and gathers them in FP8, where they are whole blocks of 128; same bits. Has "
        "not run on a GPU.",
        renamed_from=("enable_fsdp_float8_all_gather",),
        free_on_resume=True,
    )


@dataclass
class PrecisionConfig:
    """Precision."""

    compute: Compute = key(
        Compute.fp32,
        "Operands of the matrix products; master weights are always fp32.",
        renamed_from=("precision", "mixed_precision", "mixed_precision_param", "torch_dtype", "dtype"),
        other_values={"amp_bf16": "bf16", "bfloat16": "bf16", "float32": "fp32"},
    )
    optimizer_moments: Moments = key(Moments.fp32, "AdamW's moments; BF16 rounds to the nearest, or stochastically.")
    fp8: Fp8Config = key(
        Fp8Config,
        "FP8.",
        renamed_from=("float8",),
        instead_of={"bf16": "precision.compute=bf16 says so", "fp16": "there is no fp16: precision.compute=bf16"},
    )


class ActivationCheckpointing(StrEnum):
    """Activations that the backward pass recomputes."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass
class EmaConfig:
    """Moving average of the parameters."""

    decay: float = key(0.999, "Decay of the parameters' moving average.", gt=0, lt=1)
    evaluate: bool = key(False, "Evaluate the average in place of the trained parameters.")


# ------------------------------------------------------------------------------------------------------ data and loop


@dataclass
class TokenizerConfig:
    """Tokenizer."""

    name: str = key(
        "${train_loader.dataset.local}/tokenizer",
        "A Hugging Face tokenizer directory.",
        path=True,
        free_on_resume=True,
        renamed_from=("tokenizer", "tokenizer_name", "tokenizer_path", "tokenizer_model", "hf_assets_path"),
    )


@dataclass
class DatasetConfig:
    """Data of one split."""

    local: str = key(
        REQUIRED,
        "Directory written by `moefoundry prepare`; where there are streams, that of the first.",
        customary="data/NAME",
        path=True,
        free_on_resume=True,
        first_of="streams",
        renamed_from=("data_local", "dataset_path", "data_path"),
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
    max_seq_len: int = key(
        "${max_seq_len}",
        "Tokens a row; where the data were packed when they were prepared, what they were packed to.",
        ge=2,
    )
    packing: PackingConfig = key(
        PackingConfig,
        "How documents are packed; data that were packed when they were prepared stay as they are.",
        renamed_from=("packing_strategy",),
    )
    fim: FimConfig | None = key(None, "Fill-in-the-middle; null leaves documents as they are.")
    streams: dict[str, StreamConfig] | None = key(None, "Several sources, by name, in place of local and remote.")
    validate_hash: str | None = key(
        "xxh64",
        "Hash in the index that each shard is checked against before it is first read; null compares sizes.",
        free_on_resume=True,
    )

    @property
    def sources(self) -> dict[str, StreamConfig]:
        """The streams in the order of their names, each with its split; data that are no stream have the name ""."""
        sources = self.streams or {"": StreamConfig(local=self.local, remote=self.remote)}
        return {name: replace(each, split=each.split or self.split) for name, each in sorted(sources.items())}


def _eval_dataset() -> DatasetConfig:
    return DatasetConfig(local="${train_loader.dataset.local}", split="val", shuffle=False)


@dataclass
class LoaderConfig:
    """Reading of one split."""

    name: str = key("text", "Loader kind.", available=("text",))
    dataset: DatasetConfig = key(DatasetConfig, "What is read.")
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
    """Loader of the held-out split of the training data."""
    return LoaderConfig(dataset=_eval_dataset(), drop_last=False)


@dataclass
class OptimizerConfig:
    """Keys of every optimizer; those of one are in its subclass."""

    name: str = key(
        "adamw",
        "Optimizer; it decides the other keys of this mapping.",
        table="optimizers",
        renamed_from=("optimizer",),
        other_values={
            **dict.fromkeys(("decoupled_adamw", "AdamW", "adamw_torch"), "adamw"),
            **dict.fromkeys(("Muon", "dist_muon"), "muon"),
        },
    )
    lr: float = key(
        REQUIRED,
        "Peak learning rate.",
        customary="4e-4 for 1B active parameters, 2e-4 for 30B; a tenth of that to go on with trained weights",
        gt=0,
        renamed_from=("learning_rate",),
    )


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101)."""

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
    eps: float = key(1.0e-8, "Added to the root of the second moment.", gt=0, renamed_from=("adam_epsilon", "adam_eps"))
    weight_decay: float = key(0.1, "Decoupled decay of weight matrices (not norms, biases, embeddings).", ge=0)


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon (arXiv 2502.16982) for weight matrices, AdamW for embeddings, the output head, norms and biases.

    Updates have AdamW's usual size, so rate and decay are those of AdamW.
    """

    name: str = key("muon", "Optimizer; it decides the other keys of this mapping.", table="optimizers")
    momentum: float = key(
        0.95, "Decay of the momentum of matrices, which is Nesterov's.", ge=0, lt=1, renamed_from=("muon_momentum",)
    )
    weight_decay: float = key(0.1, "Decoupled decay of weight matrices (not norms, biases, embeddings).", ge=0)
    betas: list[float] = key(lambda: [0.9, 0.95], "AdamW's decay of the first and second moment.", ge=0, lt=1, length=2)
    eps: float = key(1.0e-8, "Added to the root of AdamW's second moment.", gt=0)


class ScheduleTiming(StrEnum):
    """Positions of a batch in the schedule."""

    batch_end = "batch_end"
    composer = "composer"


@dataclass
class SchedulerConfig:
    """Keys that every schedule has; the keys of one schedule are in its subclass."""

    name: str = key(
        "cosine_with_warmup",
        "Schedule; it decides the other keys of this mapping.",
        table="schedulers",
        renamed_from=("scheduler", "lr_scheduler_type", "lr_decay_style"),
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
        REQUIRED,
        "Linear warm-up.",
        customary="2000ba, or 0.01dur of a short run",
        pattern=DURATION,
        instead_of={
            **dict.fromkeys(("warmup_steps", "lr_warmup_iters"), "a duration has a unit: scheduler.t_warmup=100ba"),
            **dict.fromkeys(("warmup_ratio", "lr_warmup_fraction"), "a part of the run is scheduler.t_warmup=0.05dur"),
        },
    )


@dataclass
class ConstantWithWarmupConfig(WarmupConfig):
    """Constant rate after the warm-up."""

    name: str = key("constant_with_warmup", "Schedule; it decides the other keys of this mapping.", table="schedulers")


@dataclass
class CosineWithWarmupConfig(WarmupConfig):
    """Cosine after the warm-up."""

    alpha_f: float = key(
        0.1,
        "Final learning rate as a fraction of the peak.",
        ge=0,
        le=1,
        renamed_from=("min_lr_factor", "min_lr_ratio"),
        instead_of={"min_lr": "a fraction of the peak is given: scheduler.alpha_f=0.1"},
    )


@dataclass
class LinearDecayWithWarmupConfig(WarmupConfig):
    """Linear decay after the warm-up."""

    name: str = key(
        "linear_decay_with_warmup", "Schedule; it decides the other keys of this mapping.", table="schedulers"
    )
    alpha_f: float = key(0.0, "Final learning rate as a fraction of the peak.", ge=0, le=1)


class ClippingType(StrEnum):
    """Ways to clip gradients."""

    norm = "norm"


@dataclass
class GradientClippingConfig:
    """Gradient clipping."""

    clipping_type: ClippingType = key(ClippingType.norm, "How gradients are clipped.")
    clipping_threshold: float = key(
        1.0, "Largest global gradient norm.", gt=0, renamed_from=("max_norm", "max_grad_norm", "grad_clip", "clip_grad")
    )


class NonFinite(StrEnum):
    """Answers to a loss or gradient that is not finite."""

    stop = "stop"
    skip = "skip"


@dataclass
class AlgorithmsConfig:
    """Changes to the training loop."""

    gradient_clipping: GradientClippingConfig | None = key(GradientClippingConfig, "null does not clip.")


@dataclass
class LossConfig:
    """Keys that every further loss has; the keys of one loss are in its subclass."""

    weight: float = key(
        REQUIRED,
        "Multiplies the loss in the total; may be negative.",
        customary="1.0e-4",
        ge=-MAX_FACTOR,
        le=MAX_FACTOR,
    )


@dataclass
class DpoConfig:
    """Direct preference optimization."""

    beta: float = key(0.1, "Scale of the rewards; a smaller one leaves the reference sooner.", gt=0, le=MAX_FACTOR)


@dataclass
class LossesConfig:
    """Further losses of training."""

    logits_z: LossConfig | None = key(
        None, "Mean squared logsumexp of the output logits, which keeps them small (PaLM: weight 1.0e-4)."
    )
    router_entropy: LossConfig | None = key(
        None, "Mean entropy of the routers' scores, summed over MoE layers; a negative weight is a bonus."
    )
