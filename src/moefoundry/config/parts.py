"""The tables of parts by their kind. ``docs/extending.md`` shows how a package adds to them, and what each gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from moefoundry.config.errors import UserError
from moefoundry.config.schema_attention import AttentionConfig, GqaConfig, MlaConfig
from moefoundry.config.schema_model import RouterConfig
from moefoundry.config.schema_monitors import (
    CometConfig,
    FileLoggerConfig,
    LRMonitorConfig,
    MemoryMonitorConfig,
    MLflowConfig,
    SpeedMonitorConfig,
    SystemMonitorConfig,
    TensorBoardConfig,
    WandbConfig,
)
from moefoundry.config.schema_parts import (
    AdamWConfig,
    ConstantWithWarmupConfig,
    CosineWithWarmupConfig,
    LinearDecayWithWarmupConfig,
    LossConfig,
    MuonConfig,
    OptimizerConfig,
    SchedulerConfig,
)
from moefoundry.config.schema_router import SparseMixerConfig
from moefoundry.config.schema_tasks import (
    CodeTaskConfig,
    GenerationTaskConfig,
    InfillingConfig,
    LanguageModelingConfig,
    MultipleChoiceConfig,
    SchemaConfig,
    TaskConfig,
)
from moefoundry.config.signatures import part_of_class
from moefoundry.registry import Part, Table

COMPOSER_CALLBACKS = {
    "activation_monitor": "ActivationMonitor",
    "early_stopper": "EarlyStopper",
    "free_outputs": "FreeOutputs",
    "memory_snapshot": "MemorySnapshot",
    "mlperf": "MLPerfCallback",
    "nan_monitor": "NaNMonitor",
    "oom_observer": "OOMObserver",
    "optimizer_monitor": "OptimizerMonitor",
    "runtime_estimator": "RuntimeEstimator",
    "system_metrics_monitor": "SystemMetricsMonitor",
    "threshold_stopper": "ThresholdStopper",
}
"""Callbacks, except those that this package has itself, those that read or write pickles (``load_path`` and
``save_interval`` do that), and those for images and Hugging Face models."""

COMPOSER_ALGORITHMS = {
    "alibi": "Alibi",
    "gated_linear_units": "GatedLinearUnits",
    "gyro_dropout": "GyroDropout",
    "label_smoothing": "LabelSmoothing",
    "layer_freezing": "LayerFreezing",
    "low_precision_groupnorm": "LowPrecisionGroupNorm",
    "low_precision_layernorm": "LowPrecisionLayerNorm",
    "no_op_model": "NoOpModel",
    "sam": "SAM",
    "selective_backprop": "SelectiveBackprop",
    "seq_length_warmup": "SeqLengthWarmup",
    "stochastic_depth": "StochasticDepth",
    "swa": "SWA",
    "weight_standardization": "WeightStandardization",
}
"""Algorithms, except those for images, and those that this package has itself (``gradient_clipping``, ``ema``)."""

COMPOSER_LOGGERS = {
    "cometml_logger": "CometMLLogger",
    "mosaicml_logger": "MosaicMLLogger",
    "neptune_logger": "NeptuneLogger",
    "slack_logger": "SlackLogger",
}
"""Loggers, except those that this package has itself, the console's, uploads (``save_remote``), and one that keeps
metrics in memory."""

COMPOSER_SCHEDULERS = {
    "constant_scheduler": "ConstantScheduler",
    "cosine_annealing_scheduler": "CosineAnnealingScheduler",
    "cosine_annealing_warm_restarts_scheduler": "CosineAnnealingWarmRestartsScheduler",
    "exponential_scheduler": "ExponentialScheduler",
    "linear_scheduler": "LinearScheduler",
    "multi_step_scheduler": "MultiStepScheduler",
    "multi_step_with_warmup_scheduler": "MultiStepWithWarmupScheduler",
    "polynomial_scheduler": "PolynomialScheduler",
    "polynomial_with_warmup_scheduler": "PolynomialWithWarmupScheduler",
    "step_scheduler": "StepScheduler",
}
"""Schedulers, except those that this package has itself."""


def _composers(module: str, names: Mapping[str, str], base: type = object) -> dict[str, Callable[[], Part]]:
    """Entries for classes of Composer, which is imported when one of them is used."""
    return {name: partial(part_of_class, f"composer.{module}:{cls}", base) for name, cls in names.items()}


STOPPERS = ("early_stopper", "threshold_stopper")
"""Callbacks that end training by a metric. Composer takes more for better unless the metric's name says loss, error or
perplexity."""


def _algorithm(name: str) -> Part:
    """Make the part of an algorithm; where it cannot work on the model, a line says so."""
    part = part_of_class(f"composer.algorithms:{COMPOSER_ALGORITHMS[name]}")
    build = cast(Callable[..., Any], part.build)

    def built(cfg: Any, *others: Any) -> Any:
        algorithm = build(cfg, *others)
        apply = algorithm.apply

        def applied(*args: Any) -> Any:
            try:
                return apply(*args)
            except (AttributeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
                raise _unsuited(name, error) from error
            except RuntimeError as error:
                if type(error) is not RuntimeError:  # memory has ended, say
                    raise
                raise _unsuited(name, error) from error

        algorithm.apply = applied
        return algorithm

    return Part(part.config, built)


def _unsuited(name: str, error: Exception) -> UserError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"algorithms.{name}: Composer's algorithm cannot work on this model: {said}; leave it out")


def _stopper(name: str) -> Part:
    """Make the part of one of :data:`STOPPERS`, for which less is better of an entropy, too."""
    part = part_of_class(f"composer.callbacks:{COMPOSER_CALLBACKS[name]}")
    build = cast(Callable[..., Any], part.build)

    def built(cfg: Any, *others: Any) -> Any:
        less = cfg.comp is None and "entropy" in cfg.monitor.lower()
        return build(replace(cfg, comp="less") if less else cfg, *others)

    return Part(part.config, built)


_TABLES = (
    Table(
        "callbacks",
        {
            "speed_monitor": Part(SpeedMonitorConfig, "moefoundry.callbacks.speed:SpeedMonitor"),
            "lr_monitor": Part(LRMonitorConfig, "moefoundry.callbacks.speed:LRMonitor"),
            "memory_monitor": Part(MemoryMonitorConfig, "moefoundry.callbacks.speed:MemoryMonitor"),
            "system_monitor": Part(SystemMonitorConfig, "moefoundry.callbacks.system:SystemMonitor"),
            **_composers("callbacks", COMPOSER_CALLBACKS),
            **{name: partial(_stopper, name) for name in STOPPERS},
        },
    ),
    Table("algorithms", {name: partial(_algorithm, name) for name in COMPOSER_ALGORITHMS}),
    Table(
        "loggers",
        {
            "wandb": Part(WandbConfig, "moefoundry.callbacks.tracker_clients:wandb"),
            "tensorboard": Part(TensorBoardConfig, "moefoundry.callbacks.tracker_clients:tensorboard"),
            "mlflow": Part(MLflowConfig, "moefoundry.callbacks.tracker_clients:mlflow"),
            "comet": Part(CometConfig, "moefoundry.callbacks.tracker_clients:comet"),
            "file_logger": Part(FileLoggerConfig, "moefoundry.callbacks.tracker_clients:file_logger"),
            **_composers("loggers", COMPOSER_LOGGERS),
        },
    ),
    Table(
        "schedulers",
        {
            "cosine_with_warmup": Part(CosineWithWarmupConfig, "moefoundry.callbacks.learning_rate:cosine"),
            "linear_decay_with_warmup": Part(LinearDecayWithWarmupConfig, "moefoundry.callbacks.learning_rate:linear"),
            "constant_with_warmup": Part(ConstantWithWarmupConfig, "moefoundry.callbacks.learning_rate:constant"),
            **_composers("optim", COMPOSER_SCHEDULERS, SchedulerConfig),
        },
        SchedulerConfig,
    ),
    Table(
        "optimizers",
        {
            "adamw": Part(AdamWConfig, "moefoundry.optim:adamw_of_recipe"),
            "muon": Part(MuonConfig, "moefoundry.muon:muon_of_recipe"),
        },
        OptimizerConfig,
    ),
    Table(
        "losses",
        {
            "logits_z": Part(LossConfig, "moefoundry.model.losses:logits_z"),
            "router_entropy": Part(LossConfig, "moefoundry.model.losses:router_entropy"),
        },
        LossConfig,
    ),
    Table(
        "icl_task_types",
        {
            "multiple_choice": Part(MultipleChoiceConfig, "moefoundry.evaluation.tasks.choice:MultipleChoice"),
            "schema": Part(SchemaConfig, "moefoundry.evaluation.tasks.choice:Schema"),
            "language_modeling": Part(LanguageModelingConfig, "moefoundry.evaluation.tasks.modeling:LanguageModeling"),
            "generation_task_with_answers": Part(
                GenerationTaskConfig, "moefoundry.evaluation.tasks.generated:GenerationWithAnswers"
            ),
            "code_evaluation": Part(CodeTaskConfig, "moefoundry.evaluation.tasks.code:CodeEvaluation"),
            "infilling": Part(InfillingConfig, "moefoundry.evaluation.tasks.infilling:Infilling"),
        },
        TaskConfig,
    ),
    Table(
        "attention_kinds",
        {
            "gqa": Part(GqaConfig, "moefoundry.model.attention:GroupedQueryAttention"),
            "mla": Part(MlaConfig, "moefoundry.model.mla:MultiHeadLatentAttention"),
        },
        AttentionConfig,
    ),
    Table(
        "router_scores",
        {
            "softmax": Part(RouterConfig, "moefoundry.moe.router:softmax"),
            "sigmoid": Part(RouterConfig, "moefoundry.moe.router:sigmoid"),
            "sparsemixer": Part(SparseMixerConfig, "moefoundry.moe.sparse_mixer:SparseMixer"),
        },
        RouterConfig,
    ),
    Table(
        "mixture_backends",
        {
            name: Part(None, f"moefoundry.moe.mixture:{name}")
            for name in ("auto", "triton", "grouped_mm", "loop", "megablocks", "quack")
        },
        base=None,
    ),
    Table(
        "families",
        {
            name: Part(None, f"moefoundry.conversion.families.{place}")
            for name, place in {
                "llama": "llama:Llama",
                "qwen2": "qwen:Qwen2",
                "qwen3": "qwen:Qwen3",
                "mixtral": "llama_moe:Mixtral",
                "olmoe": "llama_moe:Olmoe",
                "qwen3_moe": "qwen:Qwen3Moe",
                "deepseek_v3": "deepseek_v3:DeepseekV3",
                "dbrx": "dbrx:Dbrx",
                "qwen2_moe": "qwen2_moe:Qwen2Moe",
                "granitemoe": "granite_moe:GraniteMoe",
                "deepseek_v2": "deepseek_v2:DeepseekV2",
                "dots1": "dots1:Dots1",
                "solar_open": "dots1:SolarOpen",
                "glm4_moe": "glm4_moe:Glm4Moe",
                "glm4_moe_lite": "glm4_moe:Glm4MoeLite",
                "minimax_m2": "minimax_m2:MinimaxM2",
                "ernie4_5_moe": "ernie4_5_moe:Ernie45Moe",
                "qwen3_next": "qwen3_next:Qwen3Next",
                "qwen3_5_moe_text": "qwen3_5_moe:Qwen35Moe",
                "deepseek_v32": "deepseek_v32:DeepseekV32",
                "glm_moe_dsa": "glm_moe_dsa:GlmMoeDsa",
                "olmo2": "olmo2:Olmo2",
                "flex_olmo": "olmo2:FlexOlmo",
                "hunyuan_v1_moe": "hunyuan_v1_moe:HunyuanV1Moe",
                "hy_v3": "hy_v3:HyV3",
                "sarvam_moe": "ling:SarvamMoe",
                "bailing_moe": "ling:BailingMoe",
                "gpt_oss": "gpt_oss:GptOss",
                "olmo3": "olmo2:Olmo3",
                "phimoe": "phimoe:PhiMoe",
                "mellum": "mellum:Mellum",
                "exaone_moe": "exaone_moe:ExaoneMoe",
                "afmoe": "afmoe:Afmoe",
            }.items()
        },
        base=None,
    ),
)
TABLES = {table.kind: table for table in _TABLES}
