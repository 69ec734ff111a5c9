"""The recipe, typed at every depth. Its defaults *are* ``configs/quickstart.yaml`` (a test keeps them equal).

One dataclass for each mapping of the YAML; a parent never repeats a child's fields. :func:`key` adds to a field what
the type cannot say: its documentation, its range, and which of its values this release can run (``available``), so
that the error messages, ``docs/recipe.md`` and the checks all come from this file. Units: sizes in tokens or elements,
durations as Composer time strings (``200ba``, ``1ep``, ``1000000tok``, ``512sp``).

A key that joins ``model`` is off by default (null, false, 0, none), so that checkpoints without it can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

DURATION = r"\d{1,18}(ba|ep|tok|sp)|\d{1,18}(\.\d{1,18})?dur"  # no more digits than an int64 holds
INTERVAL = r"[1-9]\d{0,17}(ba|ep|tok|sp)"
BATCHES = r"[1-9]\d{0,17}ba"
NAME = r"(?!\.{1,2}\Z)[\w.\-]+"
SPLIT = r"[\w.\-/]*"
TEXT = r"(?s).+"
TAG = r"(?s).{1,64}"
MAX_SEED = 2**32 - 1  # of NumPy's generators
MAX_BATCH = 2**20  # the loader keeps a number for each sample of a batch, also of one that is larger than the data
MAX_TIMEOUT = 366 * 86400  # a year; the libraries' own counters end far above
PATTERN_HINTS = {
    SPLIT: "letters, digits, '_', '-', '.' and '/'",
    NAME: "letters, digits, '_', '-' and '.', but not '.' or '..'",
    TEXT: "text, not empty",
    TAG: "texts of 1 to 64 characters",
    DURATION: "a duration: an integer and ba, ep, tok or sp, or a part of the run such as 0.05dur",
    INTERVAL: "a duration: a positive integer and ba, ep, tok or sp",
    BATCHES: "a positive integer and ba",
}


def key(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    pattern: str | None = None,
    length: int | None = None,
    available: tuple[Any, ...] | None = None,
    variants: dict[str, type] | None = None,
    tag: str = "kind",
    path: bool = False,
) -> Any:
    """A recipe field.

    Args:
        default: The value, or a callable that makes it (a dataclass, or a lambda for lists).
        doc: One sentence for ``docs/recipe.md``.
        ge, gt, le, lt: Numeric bounds.
        pattern: A regular expression that a string must match in full.
        length: How many elements a list must have.
        available: The values that this release can run; others of the type are refused as "not available yet".
        variants: For a mapping whose keys depend on one of them: the value of ``tag`` -> the dataclass.
        tag: The key that selects among ``variants``.
        path: Whether a string names a file or directory: ``~`` is expanded. It may be a URL where ``doc`` says so.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "doc": doc,
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "pattern": pattern,
        "length": length,
        "available": available,
        "variants": variants,
        "tag": tag,
        "path": path,
    }
    if isinstance(default, Callable):  # type: ignore[arg-type]
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------------- model


class NormKind(StrEnum):
    rmsnorm = "rmsnorm"
    layernorm = "layernorm"


class ScoreFunction(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class Assignment(StrEnum):
    scores = "scores"
    uniform = "uniform"


class QkNorm(StrEnum):
    none = "none"
    head = "head"
    full = "full"


class AttentionBias(StrEnum):
    none = "none"
    qkv = "qkv"
    all = "all"


class AuxLossScope(StrEnum):
    sequence = "sequence"
    micro_batch = "micro_batch"
    global_batch = "global_batch"


class ExpertBackend(StrEnum):
    auto = "auto"
    triton = "triton"
    grouped_mm = "grouped_mm"
    loop = "loop"
    megablocks = "megablocks"


@dataclass
class NormConfig:
    kind: NormKind = key(NormKind.rmsnorm, "Normalization layer; neither kind has a bias.")
    eps: float = key(1.0e-6, "Added to the mean square before the root.", gt=0)


@dataclass
class InitConfig:
    std: float = key(0.06, "Standard deviation of every weight matrix; norms start at 1.", gt=0)


@dataclass
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071); null factors follow Hugging Face's ``rope_scaling``."""

    factor: float = key(40.0, "How many times longer the context becomes.", ge=1)
    original_max_seq_len: int = key(4096, "Context length before the extension, in tokens.", ge=1)
    beta_fast: float = key(32.0, "Rotations over the original context from which frequencies stay as they are.", gt=0)
    beta_slow: float = key(1.0, "Rotations up to which frequencies are divided by the factor.", gt=0)
    mscale: float | None = key(None, "DeepSeek's factor in the magnitude of cosines and sines.", gt=0)
    mscale_all_dim: float | None = key(None, "DeepSeek's factor in the softmax scale.", gt=0)


@dataclass
class AttentionConfig:
    """What every attention kind has; the keys of a kind are in its subclass."""

    kind: str = key("gqa", "Attention kind; it decides the other keys of this mapping.")
    n_heads: int = key(8, "Query heads.", ge=1)
    rope_theta: float = key(10000.0, "Base of the rotary position embedding.", gt=0)
    yarn: YarnConfig | None = key(None, "Context extension; null leaves the frequencies as they are.")


@dataclass
class GqaConfig(AttentionConfig):
    """Grouped-query attention (arXiv 2305.13245); ``n_kv_heads == n_heads`` is multi-head attention."""

    n_kv_heads: int = key(4, "Key and value heads; divides n_heads.", ge=1)
    head_dim: int | None = key(None, "Width of a head; null is d_model / n_heads.", ge=2)
    qk_norm: QkNorm = key(QkNorm.none, "RMSNorm of queries and keys: over each head, or over all heads together.")
    bias: AttentionBias = key(AttentionBias.none, "Which projections have a bias.")
    clip_qkv: float | None = key(None, "Clamps queries, keys and values to [-clip_qkv, clip_qkv].", gt=0)
    sliding_window: int | None = key(None, "Tokens a position sees, itself included; null sees all before it.", ge=1)


@dataclass
class MlaConfig(AttentionConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in the published weights' interleaved RoPE."""

    kind: str = key("mla", "Attention kind; it decides the other keys of this mapping.")
    q_lora_rank: int | None = key(None, "Width of the compressed queries; null does not compress them.", ge=1)
    kv_lora_rank: int = key(512, "Width of the compressed keys and values.", ge=1)
    qk_nope_head_dim: int = key(128, "Width of a query's and key's part without position.", ge=1)
    qk_rope_head_dim: int = key(64, "Width of the part with position; the keys of all heads share it.", ge=2)
    v_head_dim: int = key(128, "Width of a value.", ge=1)


@dataclass
class RouterConfig:
    score_function: ScoreFunction = key(ScoreFunction.softmax, "Maps router logits to scores.")
    normalize_topk: bool = key(True, "Divide the top-k weights by their sum.")
    scale: float = key(1.0, "Multiplies the top-k weights after normalization.", gt=0)
    num_groups: int = key(1, "Expert groups for group-limited routing.", ge=1)
    top_k_groups: int = key(1, "Groups a token may reach.", ge=1)
    input_jitter: float = key(
        0.0, "In training, the gate's input is multiplied by uniform noise in 1 +- this.", ge=0, lt=1
    )
    assignment: Assignment = key(
        Assignment.scores, "Which experts a token gets: the best by score, or for benchmarks all of them in turn."
    )


@dataclass
class BalanceConfig:
    aux_loss_weight: float = key(0.01, "Weight of the load-balance loss.", ge=0)
    aux_loss_scope: AuxLossScope = key(
        AuxLossScope.sequence, "Tokens over which the load-balance loss takes its means."
    )
    z_loss_weight: float = key(0.001, "Weight of the router z-loss.", ge=0)
    bias_update_rate: float = key(0.0, "Step of the auxiliary-loss-free expert bias; 0 leaves it alone.", ge=0)
    bias_freeze_at: str | None = key(None, "When the expert bias stops changing.", pattern=INTERVAL)


@dataclass
class MoEConfig:
    num_experts: int = key(16, "Routed experts of each MoE layer.", ge=1)
    top_k: int = key(2, "Routed experts of each token.", ge=1)
    expert_hidden_size: int = key(256, "Hidden width of one routed expert.", ge=1)
    num_shared_experts: int = key(1, "Experts that see every token (one FFN of this many widths).", ge=0)
    router: RouterConfig = key(RouterConfig, "Routing.")
    balance: BalanceConfig = key(BalanceConfig, "Load balancing.")
    capacity_factor: float | None = key(
        None,
        "An expert takes at most this times its even share of a micro-batch, best scores first; null is dropless.",
        gt=0,
    )
    backend: ExpertBackend = key(
        ExpertBackend.auto,
        "How experts multiply; auto takes the fastest for the device, dtype and size, loop is the plain oracle.",
        available=(ExpertBackend.auto, ExpertBackend.triton, ExpertBackend.grouped_mm, ExpertBackend.loop),
    )

    @property
    def has_expert_bias(self) -> bool:
        """Whether routers have a bias for the choice of experts."""
        return self.router.score_function == ScoreFunction.sigmoid or self.balance.bias_update_rate > 0

    @property
    def group_votes(self) -> int:
        """How many of a group's best experts its score is the sum of: as in DeepSeek's published code, two where there
        is a bias (DeepSeek-V3), else one (DeepSeek-V2)."""
        return 2 if self.has_expert_bias else 1


@dataclass
class MtpConfig:
    depth: int = key(0, "Multi-token-prediction modules.", ge=0)
    loss_weight: float = key(0.3, "Weight of the multi-token-prediction loss.", ge=0)


@dataclass
class ModelConfig:
    name: str = key("moe_causal_lm", "The model family.", available=("moe_causal_lm",))
    vocab_size: int = key(4096, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=2)
    d_model: int = key(256, "Width of the residual stream.", ge=1)
    n_layers: int = key(6, "Transformer blocks.", ge=1)
    n_dense_layers: int = key(1, "How many of the first blocks use a dense FFN.", ge=0)
    dense_layers: list[int] = key(list, "Further blocks (from 0) that use a dense FFN.", ge=0)
    ffn_hidden_size: int = key(1024, "Hidden width of the dense FFN.", ge=1)
    norm: NormConfig = key(NormConfig, "Normalization.")
    tie_embeddings: bool = key(False, "Use the embedding as the output head.")
    init: InitConfig = key(InitConfig, "Initial weights.")
    attention: AttentionConfig = key(GqaConfig, "Attention.", variants={"gqa": GqaConfig, "mla": MlaConfig})
    document_masking: bool = key(False, "A token sees its own document alone, not all before it in the sequence.")
    moe: MoEConfig = key(MoEConfig, "Mixture of experts.")
    mtp: MtpConfig = key(MtpConfig, "Multi-token prediction.")


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
    name: str = key("${train_loader.dataset.local}/tokenizer", "A Hugging Face tokenizer directory.", path=True)


@dataclass
class DatasetConfig:
    local: str = key("data/quickstart", "Directory written by `moefoundry prepare`.", path=True)
    remote: str | None = key(None, "Where missing shards are downloaded from; a URL or a path.", path=True)
    split: str = key("train", "Sub-directory of local and remote.", pattern=SPLIT)
    shuffle: bool = key(True, "Shuffle samples.")
    shuffle_seed: int = key("${seed}", "Seed of the shuffle.", ge=0, le=MAX_SEED)
    max_seq_len: int = key("${max_seq_len}", "Tokens a sample; must be what the data were packed to.", ge=2)
    validate_hash: str | None = key(
        "xxh64", "Hash in the index that each shard is checked against before it is first read; null compares sizes."
    )


def _eval_dataset() -> DatasetConfig:
    return DatasetConfig(local="${train_loader.dataset.local}", split="val", shuffle=False)


@dataclass
class LoaderConfig:
    name: str = key("text", "Loader kind.", available=("text",))
    dataset: DatasetConfig = key(DatasetConfig, "What is read.")
    drop_last: bool = key(True, "Drop the last incomplete batch.")
    num_workers: int = key(0, "Loader processes of each rank.", ge=0, le=1024)


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

    run_name: str = key("quickstart", "Name of the run.", pattern=NAME)
    run_dir: str = key("runs/${run_name}", "Everything a run writes goes here.", path=True)
    seed: int = key(17, "Seed of weights, shuffling and sampling.", ge=0, le=MAX_SEED)
    max_seq_len: int = key(512, "Tokens a sequence.", ge=2)
    model: ModelConfig = key(ModelConfig, "The model.")
    mesh: MeshConfig = key(MeshConfig, "The device mesh.")
    precision: PrecisionConfig = key(PrecisionConfig, "Precision.")
    activation_checkpointing: ActivationCheckpointing = key(
        ActivationCheckpointing.none, "What the backward pass recomputes."
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
        NonFinite.stop, "A loss or gradient that is not finite stops the run before the update, or skips the step."
    )
    callbacks: CallbacksConfig = key(CallbacksConfig, "Monitors.")
    loggers: LoggersConfig = key(LoggersConfig, "Where metrics go besides metrics.jsonl.")
    max_duration: str = key("200ba", "Length of training.", pattern=INTERVAL)
    eval_interval: str = key("100ba", "Time between evaluations.", pattern=INTERVAL)
    global_train_batch_size: int = key(4, "Sequences of one optimizer step, over all ranks.", ge=1, le=MAX_BATCH)
    device_train_microbatch_size: int = key(2, "Sequences of one forward pass of one rank.", ge=1, le=MAX_BATCH)
    device_eval_batch_size: int = key(4, "Sequences of one evaluation batch of one rank.", ge=1, le=MAX_BATCH)
    save_interval: str = key("100ba", "Time between checkpoints.", pattern=INTERVAL)
    save_async: bool = key(True, "Train on while a checkpoint is written; false waits for it.")
    save_num_checkpoints_to_keep: int = key(2, "Newest checkpoints kept; -1 keeps all.", ge=-1)
    save_keep_every: str | None = key(
        None, "Of each such span, the first checkpoint is kept for good.", pattern=BATCHES
    )
    save_keep_best: str | None = key(None, "A loss of metrics.jsonl; the checkpoint where it was lowest is kept.")
    save_remote: str | None = key(
        None, "Checkpoints are also uploaded to this URL, such as s3://bucket/run, or path.", path=True
    )
    load_path: str | None = key(
        None, "Checkpoint whose run is continued in this run_dir, from its batch on; may be a URL.", path=True
    )
    load_weights_only: bool = key(
        False, "Take the weights alone from load_path: counters, schedule, optimizer and data begin anew."
    )
    allow_batch_size_change: bool = key(
        False, "Resume with another global_train_batch_size, although the rest of the epoch is then drawn anew."
    )
    autoresume: bool = key(False, "Continue from the newest checkpoint of run_dir, if there is one.")
    dist_timeout: float = key(600.0, "Seconds after which a collective gives up.", ge=1, le=MAX_TIMEOUT)
    progress_bar: bool = key(True, "Progress bar on a terminal.")
    log_to_console: bool = key(True, "Print metrics.")
    console_log_interval: str = key("10ba", "Time between printed metrics.", pattern=INTERVAL)
    icl_tasks: list[str] | None = key(None, "In-context tasks to evaluate.", available=(None,))
