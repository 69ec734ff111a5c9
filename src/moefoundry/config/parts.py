"""The tables of parts by their kind. ``docs/extending.md`` shows how a package adds to them, and what each gives."""

from __future__ import annotations

from functools import partial

from moefoundry.config.schema_model import RouterConfig
from moefoundry.config.schema_monitors import (
    LRMonitorConfig,
    MemoryMonitorConfig,
    MLflowConfig,
    SpeedMonitorConfig,
    TensorBoardConfig,
    WandbConfig,
)
from moefoundry.config.schema_parts import (
    AdamWConfig,
    ConstantWithWarmupConfig,
    CosineWithWarmupConfig,
    LinearDecayWithWarmupConfig,
    OptimizerConfig,
    SchedulerConfig,
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
"""All but those that this package has itself, those that read and write pickles (checkpoints are read and written by
``load_path`` and ``save_interval``), and those of images and of Hugging Face models."""

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
"""All but those of images, and those that this package has itself (``gradient_clipping``, ``ema``)."""

TABLES = {
    table.kind: table
    for table in (
        Table(
            "callbacks",
            {
                "speed_monitor": Part(SpeedMonitorConfig, "moefoundry.callbacks.speed:SpeedMonitor"),
                "lr_monitor": Part(LRMonitorConfig, "moefoundry.callbacks.speed:LRMonitor"),
                "memory_monitor": Part(MemoryMonitorConfig, "moefoundry.callbacks.speed:MemoryMonitor"),
                **{
                    name: partial(part_of_class, f"composer.callbacks:{cls}")
                    for name, cls in COMPOSER_CALLBACKS.items()
                },
            },
        ),
        Table(
            "algorithms",
            {name: partial(part_of_class, f"composer.algorithms:{cls}") for name, cls in COMPOSER_ALGORITHMS.items()},
        ),
        Table(
            "loggers",
            {
                "wandb": Part(WandbConfig, "moefoundry.callbacks.trackers:wandb"),
                "tensorboard": Part(TensorBoardConfig, "moefoundry.callbacks.trackers:tensorboard"),
                "mlflow": Part(MLflowConfig, "moefoundry.callbacks.trackers:mlflow"),
            },
        ),
        Table(
            "schedulers",
            {
                "cosine_with_warmup": Part(CosineWithWarmupConfig, "moefoundry.callbacks.learning_rate:cosine"),
                "linear_decay_with_warmup": Part(
                    LinearDecayWithWarmupConfig, "moefoundry.callbacks.learning_rate:linear"
                ),
                "constant_with_warmup": Part(ConstantWithWarmupConfig, "moefoundry.callbacks.learning_rate:constant"),
            },
            SchedulerConfig,
        ),
        Table("optimizers", {"adamw": Part(AdamWConfig, "moefoundry.optim:adamw_of_recipe")}, OptimizerConfig),
        Table(
            "router_scores",
            {
                "softmax": Part(RouterConfig, "moefoundry.moe.router:softmax"),
                "sigmoid": Part(RouterConfig, "moefoundry.moe.router:sigmoid"),
            },
            RouterConfig,
        ),
    )
}
