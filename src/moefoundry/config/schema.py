"""The recipe, typed at every depth.

Keys that depend on the model, the data or the machine are required; the others have a default that is safe at any
size. There is one dataclass for each mapping of the YAML; a parent never repeats a child's fields. ``key`` adds to a
field all that its type does not say: documentation, range, customary values, values that this release can run
(``available``), changes allowed to a resumed run, names elsewhere. The error messages, ``docs/recipe.md`` and the
checks come from here and from the other ``schema_*`` files. Units: sizes in tokens or elements, durations as Composer
time strings (``200ba``, ``1ep``, ``1000000tok``, ``512sp``).
"""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config.field import BATCHES, INTERVAL, MAX_BATCH, MAX_SEED, MAX_TIMEOUT, NAME, REQUIRED, Auto, key
from moefoundry.config.schema_curriculum import StageConfig
from moefoundry.config.schema_launch import LaunchConfig
from moefoundry.config.schema_lora import LoraConfig
from moefoundry.config.schema_model import ModelConfig
from moefoundry.config.schema_monitors import (
    CallbacksConfig,
    LoggersConfig,
)
from moefoundry.config.schema_parts import (
    ActivationCheckpointing,
    AdamWConfig,
    AlgorithmsConfig,
    CosineWithWarmupConfig,
    DpoConfig,
    EmaConfig,
    LoaderConfig,
    LossesConfig,
    MeshConfig,
    NonFinite,
    OptimizerConfig,
    PrecisionConfig,
    SchedulerConfig,
    TokenizerConfig,
    held_out_loader,
)
from moefoundry.config.versions import FORMAT_VERSION


@dataclass
class Recipe:
    """One training run."""

    format_version: int = key(
        FORMAT_VERSION,
        "Version of these keys, in the recipes that runs and checkpoints keep; a file need not say it.",
        ge=1,
        le=FORMAT_VERSION,
        free_on_resume=True,
    )
    run_name: str = key(
        REQUIRED,
        "Name of the run.",
        customary="model and purpose, such as olmoe-1b-7b",
        pattern=NAME,
        free_on_resume=True,
    )
    run_dir: str = key(
        "runs/${run_name}",
        "Everything a run writes goes here.",
        path=True,
        free_on_resume=True,
        renamed_from=("output_dir", "dump_folder"),
        instead_of={
            "save_folder": "a run writes to run_dir, checkpoints to run_dir/checkpoints; save_remote uploads them",
            **dict.fromkeys(
                ("save_overwrite", "overwrite_output_dir"),
                "nothing is ever overwritten: choose another run_name, or go on with autoresume=true",
            ),
            "save_filename": "checkpoints are run_dir/checkpoints/ba100, ba200, ...",
        },
    )
    seed: int = key(17, "Seed of weights, shuffling and sampling.", ge=0, le=MAX_SEED, renamed_from=("global_seed",))
    max_seq_len: int = key(
        REQUIRED,
        "Tokens a sequence.",
        customary="4096 or 8192",
        ge=2,
        renamed_from=(
            "max_position_embeddings",
            "model_max_length",
            "seq_len",
            "seq_length",
            "sequence_length",
            "max_length",
        ),
    )
    model: ModelConfig = key(ModelConfig, "The model.")
    lora: LoraConfig | None = key(
        None,
        "Low-rank adapters that are trained in place of the weights; null trains all weights.",
        renamed_from=("adapter", "lora_config", "peft", "peft_config"),
    )
    mesh: MeshConfig = key(
        MeshConfig,
        "The device mesh.",
        free_on_resume=True,
        renamed_from=("parallelism_config", "parallelism", "device_mesh"),
        instead_of={
            **dict.fromkeys(
                ("fsdp_config", "fsdp", "deepspeed", "use_distributed_optimizer"),
                "parameters are sharded over mesh.shard ranks; activation_checkpointing is a key of its own",
            ),
            **{
                f"{kind}_{name}": f"there is no {kind} parallelism; mesh has replicate, shard and expert"
                for kind in ("tensor", "pipeline", "context")
                for name in ("parallel_degree", "model_parallel_size" if kind != "context" else "parallel_size")
            },
        },
    )
    precision: PrecisionConfig = key(PrecisionConfig, "Precision.")
    activation_checkpointing: ActivationCheckpointing = key(
        ActivationCheckpointing.none,
        "What the backward pass recomputes.",
        free_on_resume=True,
        renamed_from=(
            "gradient_checkpointing",
            "activation_checkpoint",
            "recompute_granularity",
            "recompute_activations",
        ),
        other_values={"true": "full", "false": "none"},
    )
    compile: bool = key(
        False,
        "torch.compile of attention, router and dense feed-forward networks.",
        renamed_from=("torch_compile", "compile_config"),
    )
    fused_kernels: bool = key(
        False,
        "On an NVIDIA GPU, kernels of this project for norms, rotations, routers, the softmax of the output logits and "
        "AdamW with BF16 moments, and attention in segments where there are documents, windows or sinks. They equal "
        "PyTorch's operators to rounding, and have not run on a GPU yet.",
        free_on_resume=True,
    )
    ema: EmaConfig | None = key(None, "Moving average of the parameters, in CPU memory.")
    tokenizer: TokenizerConfig = key(TokenizerConfig, "Tokenizer.")
    train_loader: LoaderConfig = key(LoaderConfig, "Training data.")
    eval_loader: LoaderConfig | None = key(held_out_loader, "Held-out data; null does not evaluate.")
    optimizer: OptimizerConfig = key(AdamWConfig, "Optimizer.", table="optimizers", tag="name")
    scheduler: SchedulerConfig = key(
        CosineWithWarmupConfig,
        "Learning-rate schedule.",
        table="schedulers",
        tag="name",
        renamed_from=("lr_scheduler",),
    )
    losses: LossesConfig = key(LossesConfig, "Further losses of training.", table="losses", tag="")
    dpo: DpoConfig | None = key(
        None, "Direct preference optimization on pairs of responses, in place of the cross entropy."
    )
    algorithms: AlgorithmsConfig = key(AlgorithmsConfig, "Changes to the training loop.", table="algorithms", tag="")
    nonfinite: NonFinite = key(
        NonFinite.stop,
        "A loss or gradient that is not finite stops the run before the update, or skips the step.",
        free_on_resume=True,
    )
    callbacks: CallbacksConfig = key(CallbacksConfig, "Monitors.", free_on_resume=True, table="callbacks", tag="")
    loggers: LoggersConfig = key(
        LoggersConfig,
        "Where metrics go besides metrics.jsonl.",
        free_on_resume=True,
        table="loggers",
        tag="",
        instead_of={"report_to": "a mapping of loggers turns one on: loggers.wandb={}"},
    )
    curriculum: dict[str, StageConfig] | None = key(
        None,
        "Stages of training, by name and in order: their rows, batches and mixtures of streams. Stages that have begun "
        "stay as they are; later ones may change.",
        free_on_resume=True,
        renamed_from=("curriculum_learning",),
        instead_of={
            "rampup_batch_size": "stages of a curriculum have a global_train_batch_size each: docs/reading.md",
            "seq_length_warmup": "stages of a curriculum have a max_seq_len each: docs/reading.md",
        },
    )
    max_duration: str = key(
        REQUIRED,
        "Length of training.",
        customary="at least 20 tokens for each active parameter, such as 100000000000tok",
        pattern=INTERVAL,
        free_on_resume=True,
        instead_of={
            "steps": "a duration has a unit: max_duration=1000ba",
            "train_iters": "a duration has a unit: max_duration=1000ba",
            "max_steps": "a duration has a unit: max_duration=1000ba",
            "train_steps": "a duration has a unit: max_duration=1000ba",
            "num_train_epochs": "a duration has a unit: max_duration=2ep",
            "epochs": "a duration has a unit: max_duration=2ep",
            "max_epochs": "a duration has a unit: max_duration=2ep",
        },
    )
    eval_interval: str = key(
        "1000ba",
        "Time between evaluations.",
        pattern=INTERVAL,
        free_on_resume=True,
        instead_of={
            "eval_first": "nothing is evaluated before the first batch; eval_interval says when",
            "eval_steps": "a duration has a unit: eval_interval=100ba",
            "eval_strategy": "eval_interval says when; eval_loader=null never does",
            "evaluation_strategy": "eval_interval says when; eval_loader=null never does",
        },
    )
    eval_subset_num_batches: int = key(
        -1,
        "Batches of each rank that an evaluation takes, the first; -1 takes all.",
        ge=-1,
        free_on_resume=True,
        renamed_from=("eval_iters",),
    )
    global_train_batch_size: int = key(
        REQUIRED,
        "Sequences of one optimizer step, over all ranks.",
        customary="1 to 16 million tokens: 256 to 4096 sequences of 4096",
        ge=1,
        le=MAX_BATCH,
        renamed_from=("global_batch_size", "train_batch_size"),
    )
    device_train_microbatch_size: int | Auto = key(
        1,
        "Sequences of one forward pass of one rank; auto takes as many as fit by the plan of memory, and fewer where "
        "memory ends.",
        ge=1,
        le=MAX_BATCH,
        free_on_resume=True,
        renamed_from=("local_batch_size", "per_device_train_batch_size", "micro_batch_size"),
        instead_of={
            "gradient_accumulation_steps": "it follows from device_train_microbatch_size and the batch of a rank",
            "grad_accum": "it follows from device_train_microbatch_size and the batch of a rank",
            "device_train_grad_accum": "it follows from device_train_microbatch_size and the batch of a rank",
        },
    )
    device_eval_batch_size: int = key(
        1,
        "Sequences of one evaluation batch of one rank.",
        ge=1,
        le=MAX_BATCH,
        free_on_resume=True,
        renamed_from=("per_device_eval_batch_size",),
    )
    save_interval: str = key(
        "1000ba",
        "Time between checkpoints.",
        pattern=INTERVAL,
        free_on_resume=True,
        instead_of={
            "save_steps": "a duration has a unit: save_interval=100ba",
            "save_strategy": "save_interval says when",
        },
    )
    save_async: bool = key(
        True,
        "Train on while a checkpoint is written; false waits for it.",
        free_on_resume=True,
        renamed_from=("async_mode",),
    )
    save_num_checkpoints_to_keep: int = key(
        2,
        "Newest checkpoints kept; -1 keeps all.",
        ge=-1,
        free_on_resume=True,
        renamed_from=("save_total_limit", "keep_latest_k"),
    )
    save_keep_every: str | None = key(
        None, "Of each such span, the first checkpoint is kept for good.", pattern=BATCHES, free_on_resume=True
    )
    save_keep_best: str | None = key(
        None,
        "A loss of metrics.jsonl; the checkpoint where it was lowest is kept.",
        free_on_resume=True,
        instead_of={"load_best_model_at_end": "save_keep_best keeps the best checkpoint"},
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
        renamed_from=("initial_load_path", "resume_from_checkpoint"),
    )
    load_weights_only: bool = key(
        False,
        "Take the weights alone from load_path: counters, schedule, optimizer and data begin anew.",
        free_on_resume=True,
        renamed_from=("initial_load_model_only",),
    )
    allow_batch_size_change: bool = key(
        False,
        "Resume with another global_train_batch_size, although the rest of the epoch is then drawn anew.",
        free_on_resume=True,
    )
    autoresume: bool = key(
        False, "Continue from the newest checkpoint of run_dir or save_remote, if there is one.", free_on_resume=True
    )
    dist_timeout: float = key(
        600.0,
        "Seconds after which a collective gives up.",
        ge=1,
        le=MAX_TIMEOUT,
        free_on_resume=True,
        renamed_from=("init_timeout_seconds",),
    )
    progress_bar: bool = key(
        True,
        "A live view on a terminal that no other rank writes to, and where `CI` is not set; lines stand elsewhere.",
        free_on_resume=True,
    )
    log_to_console: bool = key(True, "Print metrics, where there is no live view.", free_on_resume=True)
    console_log_interval: str = key(
        "10ba",
        "Time between printed metrics.",
        pattern=INTERVAL,
        free_on_resume=True,
        renamed_from=("log_freq", "log_interval", "logging_steps"),
    )
    icl_tasks: str | list[object] | None = key(
        None,
        "In-context tasks that are evaluated at eval_interval: a list of mappings, or a YAML file with such a list.",
        free_on_resume=True,
        renamed_from=("eval_tasks",),
    )
    eval_gauntlet: str | dict[str, object] | None = key(
        None,
        "Averages of the tasks' accuracies: a mapping, or a YAML file with one.",
        free_on_resume=True,
    )
    icl_seq_len: int | None = key(
        None, "Tokens of a task's sequences at most; null is max_seq_len.", ge=2, free_on_resume=True
    )
    icl_subset_num_batches: int | None = key(
        None,
        "Of each task, the first examples alone: this many times device_eval_batch_size; null is all.",
        ge=1,
        free_on_resume=True,
    )
    launch: LaunchConfig | None = key(
        None,
        "Machines and scheduler of `moefoundry launch`; null takes every default.",
        free_on_resume=True,
        renamed_from=("scheduling", "slurm"),
    )
