"""Recipes: typed schema, strict loader, errors that name the key. Imports neither torch nor Composer."""

from moefoundry.config.advice import advice
from moefoundry.config.checks import check_recipe
from moefoundry.config.dump import annotated, diff_recipes, dump_recipe, flatten, redacted
from moefoundry.config.errors import ConfigError, DataError, LocalError, Problem, UserError
from moefoundry.config.field import REQUIRED, Auto, key
from moefoundry.config.loader import load_layers, load_model, load_recipe, recipe_of
from moefoundry.config.overrides import redact_argument, split_arguments
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_attention import (
    AttentionBias,
    AttentionConfig,
    GqaConfig,
    IndexerConfig,
    IndexerStage,
    Llama3RopeConfig,
    LongRopeConfig,
    MlaConfig,
    QkNorm,
    YarnConfig,
)
from moefoundry.config.schema_launch import LaunchConfig
from moefoundry.config.schema_linear_attention import LinearAttentionConfig, LinearBackend
from moefoundry.config.schema_lora import LoraConfig
from moefoundry.config.schema_model import (
    Assignment,
    AuxLossScope,
    BalanceConfig,
    Dispatcher,
    InitConfig,
    ModelConfig,
    MoEConfig,
    MtpConfig,
    MultipliersConfig,
    RouterConfig,
    ScoreFunction,
    SwigluConfig,
)
from moefoundry.config.schema_monitors import (
    CallbacksConfig,
    CometConfig,
    FileLoggerConfig,
    LoggersConfig,
    LRMonitorConfig,
    MemoryMonitorConfig,
    MLflowConfig,
    ReportConfig,
    SpeedMonitorConfig,
    SystemMonitorConfig,
    TensorBoardConfig,
    WandbConfig,
)
from moefoundry.config.schema_norm import NormConfig, NormKind, NormPosition
from moefoundry.config.schema_parts import (
    ActivationCheckpointing,
    AdamWConfig,
    AlgorithmsConfig,
    ClippingType,
    Compute,
    ConstantWithWarmupConfig,
    CosineWithWarmupConfig,
    DatasetConfig,
    DpoConfig,
    EmaConfig,
    Fp8Backend,
    Fp8Config,
    Fp8Recipe,
    Gather,
    GradientClippingConfig,
    LinearDecayWithWarmupConfig,
    LoaderConfig,
    LossConfig,
    LossesConfig,
    MeshConfig,
    Moments,
    MuonConfig,
    NonFinite,
    OptimizerConfig,
    PrecisionConfig,
    Reduce,
    SchedulerConfig,
    ScheduleTiming,
    TokenizerConfig,
    WarmupConfig,
)
from moefoundry.config.schema_router import SparseMixerConfig
from moefoundry.config.schema_tasks import TaskConfig

# fmt: off
__all__ = [
    "REQUIRED", "ActivationCheckpointing", "AdamWConfig", "AlgorithmsConfig", "Assignment", "AttentionBias",
    "AttentionConfig", "Auto", "AuxLossScope", "BalanceConfig", "CallbacksConfig", "ClippingType", "CometConfig",
    "Compute", "ConfigError", "ConstantWithWarmupConfig", "CosineWithWarmupConfig", "DataError", "DatasetConfig",
    "Dispatcher", "DpoConfig", "EmaConfig", "FileLoggerConfig", "Fp8Backend", "Fp8Config", "Fp8Recipe", "Gather",
    "GqaConfig", "GradientClippingConfig", "IndexerConfig", "IndexerStage", "InitConfig", "LRMonitorConfig",
    "LaunchConfig",
    "LinearAttentionConfig", "LinearBackend", "LinearDecayWithWarmupConfig", "Llama3RopeConfig", "LoaderConfig",
    "LocalError", "LoggersConfig", "LongRopeConfig", "LoraConfig", "LossConfig", "LossesConfig", "MLflowConfig",
    "MemoryMonitorConfig", "MeshConfig", "MlaConfig", "MoEConfig", "ModelConfig", "Moments", "MtpConfig",
    "MultipliersConfig", "MuonConfig", "NonFinite", "NormConfig", "NormKind", "NormPosition", "OptimizerConfig",
    "PrecisionConfig", "Problem", "QkNorm", "Recipe", "Reduce", "ReportConfig", "RouterConfig", "ScheduleTiming",
    "SchedulerConfig", "ScoreFunction", "SparseMixerConfig", "SpeedMonitorConfig", "SwigluConfig",
    "SystemMonitorConfig", "TaskConfig", "TensorBoardConfig", "TokenizerConfig", "UserError", "WandbConfig",
    "WarmupConfig", "YarnConfig", "advice", "annotated", "check_recipe", "diff_recipes", "dump_recipe", "flatten",
    "key", "load_layers", "load_model", "load_recipe", "recipe_of", "redact_argument", "redacted", "split_arguments",
]
# fmt: on
