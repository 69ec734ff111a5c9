"""The recipe, typed at every depth. Its defaults *are* ``configs/quickstart.yaml`` (a test keeps them equal).

One dataclass for each mapping of the YAML; a parent never repeats a child's fields. ``key`` adds to a field what the
type cannot say: its documentation, its range, which of its values this release can run (``available``), whether a
resumed run may change it, what it is called elsewhere. The error messages, ``docs/recipe.md`` and the checks all come
from here, and from ``schema_model`` and ``schema_parts``. Units: sizes in tokens or elements, durations as Composer
time strings (``200ba``, ``1ep``, ``1000000tok``, ``512sp``).
"""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config.field import BATCHES, INTERVAL, MAX_BATCH, MAX_SEED, MAX_TIMEOUT, NAME, key
from moefoundry.config.schema_model import ModelConfig
from moefoundry.config.schema_parts import (
    ActivationCheckpointing,
    AdamWConfig,
    AlgorithmsConfig,
    CallbacksConfig,
    CosineWithWarmupConfig,
    EmaConfig,
    LoaderConfig,
    LoggersConfig,
    LossesConfig,
    MeshConfig,
    NonFinite,
    OptimizerConfig,
    PrecisionConfig,
    SchedulerConfig,
    TokenizerConfig,
    held_out_loader,
)


@dataclass
class Recipe:
    """One training run."""

    run_name: str = key("quickstart", "Name of the run.", pattern=NAME, free_on_resume=True)
    run_dir: str = key(
        "runs/${run_name}",
        "Everything a run writes goes here.",
        path=True,
        free_on_resume=True,
        renamed_from=("output_dir", "dump_folder"),
        instead_of={
            "save_folder": "a run writes to run_dir, checkpoints to run_dir/checkpoints; save_remote uploads them",
            "save_overwrite": "nothing is ever overwritten: choose another run_name, or go on with autoresume=true",
            "save_filename": "checkpoints are run_dir/checkpoints/ba100, ba200, ...",
        },
    )
    seed: int = key(17, "Seed of weights, shuffling and sampling.", ge=0, le=MAX_SEED, renamed_from=("global_seed",))
    max_seq_len: int = key(
        512,
        "Tokens a sequence.",
        ge=2,
        renamed_from=("max_position_embeddings", "model_max_length", "seq_len", "sequence_length", "max_length"),
    )
    model: ModelConfig = key(ModelConfig, "The model.")
    mesh: MeshConfig = key(
        MeshConfig,
        "The device mesh.",
        free_on_resume=True,
        renamed_from=("parallelism_config", "parallelism", "device_mesh"),
        instead_of={
            "fsdp_config": "parameters are sharded over mesh.shard ranks; activation_checkpointing is a key of its own",
            "tensor_parallel_degree": "there is no tensor parallelism; mesh has replicate, shard and expert",
            "pipeline_parallel_degree": "there is no pipeline parallelism; mesh has replicate, shard and expert",
            "context_parallel_degree": "there is no context parallelism; mesh has replicate, shard and expert",
        },
    )
    precision: PrecisionConfig = key(PrecisionConfig, "Precision.")
    activation_checkpointing: ActivationCheckpointing = key(
        ActivationCheckpointing.none,
        "What the backward pass recomputes.",
        free_on_resume=True,
        renamed_from=("gradient_checkpointing", "activation_checkpoint"),
        other_values={"true": "full", "false": "none"},
    )
    compile: bool = key(
        False,
        "torch.compile of attention, router and dense feed-forward networks.",
        renamed_from=("torch_compile", "compile_config"),
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
    algorithms: AlgorithmsConfig = key(AlgorithmsConfig, "Changes to the training loop.", table="algorithms", tag="")
    nonfinite: NonFinite = key(
        NonFinite.stop,
        "A loss or gradient that is not finite stops the run before the update, or skips the step.",
        free_on_resume=True,
    )
    callbacks: CallbacksConfig = key(CallbacksConfig, "Monitors.", free_on_resume=True, table="callbacks", tag="")
    loggers: LoggersConfig = key(
        LoggersConfig, "Where metrics go besides metrics.jsonl.", free_on_resume=True, table="loggers", tag=""
    )
    max_duration: str = key(
        "200ba",
        "Length of training.",
        pattern=INTERVAL,
        free_on_resume=True,
        instead_of={
            "steps": "a duration has a unit: max_duration=1000ba",
            "max_steps": "a duration has a unit: max_duration=1000ba",
            "train_steps": "a duration has a unit: max_duration=1000ba",
            "num_train_epochs": "a duration has a unit: max_duration=2ep",
            "epochs": "a duration has a unit: max_duration=2ep",
            "max_epochs": "a duration has a unit: max_duration=2ep",
        },
    )
    eval_interval: str = key(
        "100ba",
        "Time between evaluations.",
        pattern=INTERVAL,
        free_on_resume=True,
        instead_of={
            "eval_first": "nothing is evaluated before the first batch; eval_interval says when",
            "eval_steps": "a duration has a unit: eval_interval=100ba",
        },
    )
    global_train_batch_size: int = key(
        4,
        "Sequences of one optimizer step, over all ranks.",
        ge=1,
        le=MAX_BATCH,
        renamed_from=("global_batch_size", "train_batch_size"),
    )
    device_train_microbatch_size: int = key(
        2,
        "Sequences of one forward pass of one rank.",
        ge=1,
        le=MAX_BATCH,
        free_on_resume=True,
        renamed_from=("local_batch_size", "per_device_train_batch_size", "micro_batch_size"),
        instead_of={
            "gradient_accumulation_steps": "it follows from device_train_microbatch_size and the batch of a rank",
            "grad_accum": "it follows from device_train_microbatch_size and the batch of a rank",
        },
        other_values={"auto": "1"},
    )
    device_eval_batch_size: int = key(
        4,
        "Sequences of one evaluation batch of one rank.",
        ge=1,
        le=MAX_BATCH,
        free_on_resume=True,
        renamed_from=("per_device_eval_batch_size",),
    )
    save_interval: str = key(
        "100ba",
        "Time between checkpoints.",
        pattern=INTERVAL,
        free_on_resume=True,
        instead_of={"save_steps": "a duration has a unit: save_interval=100ba"},
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
        False, "Continue from the newest checkpoint of run_dir, if there is one.", free_on_resume=True
    )
    dist_timeout: float = key(
        600.0,
        "Seconds after which a collective gives up.",
        ge=1,
        le=MAX_TIMEOUT,
        free_on_resume=True,
        renamed_from=("init_timeout_seconds",),
    )
    progress_bar: bool = key(True, "Progress bar on a terminal.", free_on_resume=True)
    log_to_console: bool = key(True, "Print metrics.", free_on_resume=True)
    console_log_interval: str = key(
        "10ba",
        "Time between printed metrics.",
        pattern=INTERVAL,
        free_on_resume=True,
        renamed_from=("log_freq", "logging_steps"),
    )
    icl_tasks: list[str] | None = key(
        None, "In-context tasks to evaluate.", available=(None,), renamed_from=("eval_tasks",)
    )
