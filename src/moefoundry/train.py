"""Recipe -> Composer ``Trainer`` -> fit. Read :func:`build_trainer`: it is the whole assembly, in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer import DataSpec, Evaluator, Trainer
from composer.core import Callback
from composer.devices import Device
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from composer.utils import collect_env, dist, get_device
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import nn
from torch.optim import AdamW

from moefoundry.callbacks.checkpointing import Checkpointing
from moefoundry.callbacks.console import Console
from moefoundry.callbacks.expert_bias import ExpertBias
from moefoundry.callbacks.gradient_norm import GradientNorm
from moefoundry.callbacks.metrics_file import MetricsFile
from moefoundry.callbacks.report import write_report
from moefoundry.callbacks.routing import GlobalBatchBalance, RoutingMonitor
from moefoundry.callbacks.speed import LRMonitor, MemoryMonitor, SpeedMonitor
from moefoundry.checkpoint.run_dir import open_run, store_of
from moefoundry.config import (
    Compute,
    CosineWithWarmupConfig,
    LinearDecayWithWarmupConfig,
    LoaderConfig,
    LoggersConfig,
    OptimizerConfig,
    Recipe,
    SchedulerConfig,
    UserError,
    flatten,
)
from moefoundry.data.loader import build_loader
from moefoundry.data.tokenizer import check_vocabulary
from moefoundry.evaluation.generation import complete
from moefoundry.foundry import ComposerMoECausalLM, CountTargets, count_tokens
from moefoundry.mesh import Meshes, build_meshes, by_mesh, resolve_degrees
from moefoundry.model.transformer import MoETransformer
from moefoundry.parallel import materialize, moe_layer_indices, moe_layers, parallelize, sum_between_copies
from moefoundry.planning.describe import parameter_counts

EXPECTED_WARNINGS = (
    "FSDP2 Config/APIs are experimental",
    "torch.distributed is disabled, unavailable or uninitialized",
    "Cannot split tensor of length",  # the last, smaller batch of the held-out split
    "No batches were trained",  # in the rest of an epoch of which nothing is left to a resumed run
)
"""About choices that are made here on purpose; a person at the console can do nothing about them."""


class MeshTrainer(Trainer):
    """A ``Trainer`` that takes a model as it is: sharded already, on the recipe's own mesh.

    Composer would shard it again, on a 1-D mesh of its own.
    """

    def _wrap_model_for_distributed(self, model: Any, optimizers: Any) -> None:
        pass

    def _train_microbatch(self, use_grad_scaling: bool, current_batch_size: float, is_final_microbatch: bool) -> Any:
        sum_between_copies(self.state.model, is_final_microbatch)
        return super()._train_microbatch(use_grad_scaling, current_batch_size, is_final_microbatch)


def train(recipe: Recipe, command: Sequence[str] = ()) -> Trainer:
    """Train as the recipe says, in every rank of the launched world.

    Args:
        recipe: What to train.
        command: The command that started this process; the report says how to go on with it.
    """
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    trainer = build_trainer(recipe)
    trainer.logger.log_hyperparameters(flatten(recipe))
    if trainer.state.max_duration is None or trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()
    if (report := recipe.callbacks.report) is not None:
        model = trainer.state.model.model
        completion = complete(model, Path(recipe.tokenizer.name), report.prompt, report.max_new_tokens)
        on_rank_zero(lambda: write_report(recipe, completion, command))
    trainer.close()
    return trainer


def build_trainer(recipe: Recipe) -> Trainer:
    """Assemble the run.

    Raises:
        UserError: Something the user can put right, named; nothing has been overwritten.
    """
    collect_env.get_cpu_model = lambda: "unknown"  # Composer starts an interpreter to learn it, and does not use it
    device = get_device(None)
    meshes = setup_meshes(recipe, device)
    train_data = build_data(recipe.train_loader, recipe, recipe.global_train_batch_size // dist.get_world_size())
    eval_data = recipe.eval_loader and build_data(recipe.eval_loader, recipe, recipe.device_eval_batch_size)
    if recipe.callbacks.report is not None:
        check_vocabulary(Path(recipe.tokenizer.name), recipe.model.vocab_size)
    run_dir, resume_from = on_rank_zero(lambda: open_run(recipe))
    model = build_model(recipe, meshes, device)
    metrics_file = MetricsFile(run_dir)
    return MeshTrainer(
        model=ComposerMoECausalLM(model),
        optimizers=build_optimizer(model, recipe.optimizer),
        schedulers=build_scheduler(recipe.scheduler),
        train_dataloader=train_data,
        eval_dataloader=eval_data and Evaluator(label="eval", dataloader=eval_data),
        eval_interval=recipe.eval_interval if eval_data else 0,
        max_duration=recipe.max_duration,
        device_train_microbatch_size=recipe.device_train_microbatch_size,
        callbacks=build_callbacks(recipe, model, metrics_file, resume_from),
        loggers=[metrics_file, *build_console(recipe, model), *build_loggers(recipe.loggers, run_dir)],
        parallelism_config=None if meshes is None else ParallelismConfig(fsdp2=FSDP2Config()),
        precision="fp32",  # the model's own: see precision.py
        device=device,
        run_name=recipe.run_name,
        seed=recipe.seed,
        dist_timeout=recipe.dist_timeout,
        progress_bar=False,
        log_to_console=False,
        spin_dataloaders=False,
    )


def setup_meshes(recipe: Recipe, device: Device) -> Meshes | None:
    """Join the process group and build the meshes; None where one plain process does."""
    degrees = resolve_degrees(recipe.mesh, dist.get_world_size(), dist.get_local_world_size())
    if degrees.world_size == 1 and recipe.precision.compute != Compute.bf16:
        return None
    dist.initialize_dist(device, recipe.dist_timeout)
    return build_meshes(degrees, torch.device(device._device).type)


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """The result of ``action`` on rank 0, given to every rank; a ``UserError`` there is raised on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def build_model(recipe: Recipe, meshes: Meshes | None, device: Device) -> MoETransformer:
    """The model, sharded, with its initial weights; no rank ever holds more than its shard."""
    with torch.device("meta"):
        model = MoETransformer(recipe.model)
    parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing, recipe.compile)
    materialize(model, device._device, recipe.seed)
    return model


def build_data(cfg: LoaderConfig, recipe: Recipe, batch_size: int) -> DataSpec:
    """The loader of this rank's batches of ``batch_size`` sequences."""
    loader = build_loader(
        cfg,
        batch_size=batch_size,
        model_vocab_size=recipe.model.vocab_size,
        documents_of=Path(recipe.tokenizer.name) if recipe.model.document_masking else None,
    )
    return DataSpec(loader, get_num_tokens_in_batch=count_tokens)


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> AdamW:
    """AdamW; only weight matrices decay, not norms, biases and embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() > 1 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.dim() <= 1 or id(p) in embeddings]
    groups = [{"params": params, "weight_decay": cfg.weight_decay} for params in by_mesh(decayed)]
    groups += [{"params": params, "weight_decay": 0.0} for params in by_mesh(plain)]
    return AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


def build_scheduler(cfg: SchedulerConfig) -> ComposerScheduler:
    """The learning-rate schedule."""
    if isinstance(cfg, CosineWithWarmupConfig):
        return CosineAnnealingWithWarmupScheduler(t_warmup=cfg.t_warmup, alpha_f=cfg.alpha_f)
    if isinstance(cfg, LinearDecayWithWarmupConfig):
        return LinearWithWarmupScheduler(t_warmup=cfg.t_warmup, alpha_f=cfg.alpha_f)
    return ConstantWithWarmupScheduler(t_warmup=cfg.t_warmup)


def build_callbacks(
    recipe: Recipe, model: MoETransformer, metrics_file: MetricsFile, resume_from: Path | None
) -> list[Callback]:
    """The run's callbacks, in the order they act."""
    clipping, wanted = recipe.algorithms.gradient_clipping, recipe.callbacks
    checkpointing = Checkpointing(
        store=store_of(Path(recipe.run_dir)),
        interval=recipe.save_interval,
        keep=recipe.save_num_checkpoints_to_keep,
        recipe=flatten(recipe),
        resume_from=resume_from,
    )
    callbacks = [
        CountTargets(),
        GradientNorm(clipping.clipping_threshold if clipping else None),
        model.step_counts and GlobalBatchBalance(model.step_counts),
        RoutingMonitor(metrics_file.record, moe_layer_indices(model)),
        build_expert_bias(model),
        wanted.speed_monitor and SpeedMonitor(wanted.speed_monitor.window_size),
        wanted.lr_monitor and LRMonitor(),
        wanted.memory_monitor and MemoryMonitor(),
        checkpointing,
    ]
    return [callback for callback in callbacks if callback]


def build_expert_bias(model: MoETransformer) -> ExpertBias | None:
    """What moves the experts' biases; None where they stay as they are."""
    balance, routers = model.cfg.moe.balance, [layer.router for layer in moe_layers(model)]
    if not routers or not balance.bias_update_rate:
        return None
    return ExpertBias(routers, balance.bias_update_rate, balance.bias_freeze_at)


def build_console(recipe: Recipe, model: MoETransformer) -> list[LoggerDestination]:
    """What a person sees."""
    if not (recipe.log_to_console or recipe.progress_bar):
        return []
    ranks = dist.get_world_size()
    title = f"{recipe.run_name}: {parameter_counts(model)}; {ranks} rank{'s' if ranks > 1 else ''}"
    return [Console(title, recipe.console_log_interval if recipe.log_to_console else None, recipe.progress_bar)]


def build_loggers(cfg: LoggersConfig, run_dir: Path) -> list[LoggerDestination]:
    """Experiment trackers."""
    loggers: list[LoggerDestination] = []
    if cfg.wandb:
        loggers.append(WandBLogger(**asdict(cfg.wandb), init_kwargs={"dir": str(run_dir)}))
    if cfg.tensorboard:
        loggers.append(TensorboardLogger(**asdict(cfg.tensorboard)))
    if cfg.mlflow:
        uri = cfg.mlflow.tracking_uri or f"file://{(run_dir / 'mlruns').resolve()}"
        loggers.append(MLFlowLogger(cfg.mlflow.experiment_name, cfg.mlflow.run_name, tracking_uri=uri))
    return loggers
