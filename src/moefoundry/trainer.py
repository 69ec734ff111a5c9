"""Recipe -> Composer ``Trainer`` -> fit. Read :func:`build_trainer`: it is the whole assembly, in order."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from composer import DataSpec, Evaluator, Trainer
from composer.core import Callback
from composer.devices import Device
from composer.loggers import LoggerDestination
from composer.utils import collect_env, dist, get_device
from composer.utils.parallelism import FSDP2Config, ParallelismConfig

from moefoundry.callbacks.checkpointing import Checkpointing
from moefoundry.callbacks.console import Console
from moefoundry.callbacks.ema import Ema
from moefoundry.callbacks.expert_bias import ExpertBias
from moefoundry.callbacks.gradient_norm import GradientNorm
from moefoundry.callbacks.health import FiniteCheck, named_collectives
from moefoundry.callbacks.learning_rate import LearningRate
from moefoundry.callbacks.metrics_file import MetricsFile
from moefoundry.callbacks.report import unless_it_fails, write_report
from moefoundry.callbacks.routing import GlobalBatchBalance, RoutingMonitor
from moefoundry.callbacks.signals import StopOnSignal
from moefoundry.callbacks.trackers import build_trackers, note_entries, start_trackers, try_trackers
from moefoundry.checkpoint.lease import held
from moefoundry.checkpoint.ranks import on_rank_zero
from moefoundry.checkpoint.remote import Remote
from moefoundry.checkpoint.run_dir import DOWNLOADS, claim_run_dir, open_run, store_of
from moefoundry.checkpoint.start import Start, data_digests
from moefoundry.checkpoint.store import Retention
from moefoundry.checkpoint.writer import together
from moefoundry.config import (
    Compute,
    ConfigError,
    LoaderConfig,
    Recipe,
    UserError,
    advice,
    flatten,
)
from moefoundry.config.making import make_part, make_parts
from moefoundry.config.urls import is_url, resolved
from moefoundry.data.fit import report_problems
from moefoundry.data.loader import build_loader
from moefoundry.evaluation.generation import complete
from moefoundry.foundry import ComposerMoECausalLM, CountTargets, count_tokens
from moefoundry.mesh import MeshDegrees, Meshes, build_meshes, limit_waiting, resolve_degrees
from moefoundry.model.losses import build_losses
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.moe.mixture import check_backend
from moefoundry.parallel import materialize, moe_layer_indices, moe_layers, needs_mesh, parallelize, sum_between_copies
from moefoundry.planning.describe import parameter_counts
from moefoundry.precision import describe_fp8

EXPECTED_WARNINGS = (
    r"FSDP2-wrapped module \(FSDPGroupedExperts\) returned a view",  # of emulated BF16; nothing writes to it
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
    with sole_owner(Path(recipe.run_dir)), named_collectives(recipe.dist_timeout):
        trainer = build_trainer(recipe)
        if dist.get_global_rank() == 0:
            for problem in advice(recipe):
                print(f"warning: {problem}", file=sys.stderr, flush=True)
        trainer.logger.log_hyperparameters(flatten(recipe))
        timestamp, max_duration = trainer.state.timestamp, trainer.state.max_duration
        if max_duration is None or timestamp < max_duration:
            trainer.fit()
        elif dist.get_global_rank() == 0:
            message = f"batch {timestamp.batch.value} of {max_duration.to_timestring()}: nothing left to train"
            print(message, file=sys.stderr, flush=True)
        if recipe.callbacks.report is not None and stopped_by(trainer) is None:
            report(recipe, trainer.state.model.model, command)
        trainer.close()
        if (signum := stopped_by(trainer)) is not None:
            dist.barrier()  # launchers end every rank when one ends: let all have closed first
            if dist.get_global_rank() == 0:
                message = f"stopped by {signum.name}; go on from {store_of(Path(recipe.run_dir)).latest()}"
                print(f"{message} with autoresume=true", file=sys.stderr, flush=True)
        return trainer


def report(recipe: Recipe, model: MoETransformer, command: Sequence[str]) -> None:
    """Write the report of a finished run; what of it fails is named on standard error, and the run is finished still.
    Every rank calls it."""
    cfg, completion = recipe.callbacks.report, None
    assert cfg is not None, "the caller has asked for it"
    with unless_it_fails("completion"):
        completion = complete(model, Path(recipe.tokenizer.name), cfg.prompt, cfg.max_new_tokens)
    if dist.get_global_rank() == 0:
        write_report(recipe, completion, command)


@contextmanager
def sole_owner(run_dir: Path) -> Iterator[None]:
    """Rank 0 holds the lease of ``run_dir``.

    Raises:
        UserError: Another run has it: on all ranks, or, where there is no process group yet, on rank 0.
    """
    with ExitStack() as stack:
        if torch.distributed.is_initialized() or dist.get_global_rank() == 0:
            on_rank_zero(lambda: stack.enter_context(held(run_dir)))
        yield


def stopped_by(trainer: Trainer) -> signal.Signals | None:
    """The signal that ended a run before its end."""
    (stop,) = (callback for callback in trainer.state.callbacks if isinstance(callback, StopOnSignal))
    return stop.stopped_by


def build_trainer(recipe: Recipe) -> Trainer:
    """Assemble the run.

    Raises:
        UserError: Something the user can put right, named; ``run_dir`` is as it was.
    """
    try:
        return assemble(recipe)
    except BaseException:
        if dist.get_global_rank() == 0:
            shutil.rmtree(Path(recipe.run_dir, DOWNLOADS), ignore_errors=True)
        raise


def assemble(recipe: Recipe) -> Trainer:
    """Build all parts, and claim ``run_dir`` when nothing is left that can fail."""
    collect_env.get_cpu_model = lambda: "unknown"  # Composer starts an interpreter to learn it, and does not use it
    device = get_device(None)
    meshes = setup_meshes(recipe, device)
    on_rank_zero(lambda: try_services(recipe))
    train_data = build_data(recipe.train_loader, recipe, recipe.global_train_batch_size // dist.get_world_size())
    eval_data = recipe.eval_loader and build_data(recipe.eval_loader, recipe, recipe.device_eval_batch_size)
    if problems := list(report_problems(recipe)):
        raise ConfigError(problems)
    model = build_model(recipe, meshes, device)
    digests = on_rank_zero(lambda: data_digests(recipe))
    run_dir, start = open_run(recipe, digests)
    materialize(model, device._device, recipe.seed)
    metrics_file = MetricsFile(run_dir)
    trainer = MeshTrainer(
        model=ComposerMoECausalLM(model),
        optimizers=make_part("optimizers", recipe.optimizer.name, "optimizer", recipe.optimizer, model, recipe),
        train_dataloader=train_data,
        eval_dataloader=eval_data and Evaluator(label="eval", dataloader=eval_data),
        eval_interval=recipe.eval_interval if eval_data else 0,
        max_duration=recipe.max_duration,
        device_train_microbatch_size=recipe.device_train_microbatch_size,
        callbacks=build_callbacks(recipe, model, metrics_file, digests, start),
        algorithms=make_parts("algorithms", recipe.algorithms, recipe),
        loggers=[metrics_file, *build_console(recipe, model)],
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
    continues = start is not None and start.own
    with together():
        trackers = build_trackers(recipe.loggers, run_dir, continues)
        start_trackers(trackers, trainer.state, trainer.logger)
    on_rank_zero(lambda: claim_run_dir(recipe))
    metrics_file.begin(trainer.state.timestamp.batch.value if continues else 0)
    note_entries(trackers, run_dir)
    return trainer


def try_services(recipe: Recipe) -> None:
    """Ask every service outside once, and briefly, whether it can be used; one rank calls it.

    Raises:
        UserError: One cannot.
    """
    if recipe.save_remote is not None:
        try:
            Remote(recipe.save_remote).try_writing()
        except UserError as error:
            raise UserError(f"save_remote: {error}") from error
    if recipe.load_path is not None and is_url(resolved(recipe.load_path)):
        Remote(recipe.load_path).try_reading()
    try_trackers(recipe.loggers)


def setup_meshes(recipe: Recipe, device: Device) -> Meshes | None:
    """Join the process group and build the meshes; None where one plain process does."""
    degrees = degrees_of(recipe)
    if not needs_mesh(degrees, recipe.precision):
        return None
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{recipe.run_dir}/nccl_trace_rank_")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        rejoin_world(device, recipe.dist_timeout)
    dist.initialize_dist(device, recipe.dist_timeout)
    meshes = build_meshes(degrees, torch.device(device._device).type)
    limit_waiting(meshes, recipe.dist_timeout)
    return meshes


def degrees_of(recipe: Recipe) -> MeshDegrees:
    """The mesh's degrees in the launched world."""
    return resolve_degrees(recipe.mesh, dist.get_world_size(), dist.get_local_world_size())


def rejoin_world(device: Device, timeout_seconds: float) -> None:
    """Join the process group of a run that torchrun has restarted.

    Its store outlives the ranks: under the keys of an earlier attempt are addresses where nobody answers.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store = torch.distributed.PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(
        device.dist_backend, store=store, rank=rank, world_size=world_size, timeout=timeout
    )


def build_model(recipe: Recipe, meshes: Meshes | None, device: Device) -> MoETransformer:
    """The model for ``device``, sharded, on meta: what cannot be built is found before anything is written."""
    if recipe.precision.fp8.recipe is not None:
        describe_fp8(recipe.precision.fp8, device._device)
    dtype = torch.bfloat16 if recipe.precision.compute == Compute.bf16 else torch.float32
    check_backend(recipe.model.moe, recipe.model.d_model, device._device, dtype)
    model = meta_model(recipe.model)
    model.use_losses(build_losses(recipe.losses))
    parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing, recipe.compile)
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


def build_callbacks(
    recipe: Recipe,
    model: MoETransformer,
    metrics_file: MetricsFile,
    digests: Mapping[str, str],
    start: Start | None,
) -> list[Callback]:
    """The run's callbacks, in the order they act."""
    clipping = recipe.algorithms.gradient_clipping
    ema = Ema(recipe.ema) if recipe.ema else None
    degrees = degrees_of(recipe)
    checkpointing = Checkpointing(
        store=store_of(Path(recipe.run_dir)),
        interval=recipe.save_interval,
        in_background=recipe.save_async,
        retention=build_retention(recipe),
        mesh={"replicate": degrees.replicate, "shard": degrees.shard, "expert": degrees.expert},
        metric=metrics_file.value,
        recipe=flatten(recipe),
        data_digests=digests,
        start=start,
        remote=recipe.save_remote,
        ema=ema,
    )
    gradient_norm = GradientNorm(clipping.clipping_threshold if clipping else None)
    callbacks = [
        CountTargets(),
        LearningRate(recipe, start.schedule_changes if start else ""),
        gradient_norm,
        FiniteCheck(gradient_norm, recipe.nonfinite),
        model.step_counts and GlobalBatchBalance(model.step_counts),
        RoutingMonitor(metrics_file.record, moe_layer_indices(model)),
        build_expert_bias(model),
        *make_parts("callbacks", recipe.callbacks, recipe),
        StopOnSignal(),
        checkpointing,
        ema,  # begins with the parameters that Checkpointing has read
    ]
    return [callback for callback in callbacks if callback]


def build_retention(recipe: Recipe) -> Retention:
    """Which checkpoints are kept."""
    every = recipe.save_keep_every
    return Retention(
        newest=recipe.save_num_checkpoints_to_keep,
        every=None if every is None else int(every.removesuffix("ba")),
        best=recipe.save_keep_best,
    )


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
    if recipe.precision.fp8.recipe is not None:
        title += f"; FP8 {describe_fp8(recipe.precision.fp8, next(model.parameters()).device)}"
    return [Console(title, recipe.console_log_interval if recipe.log_to_console else None, recipe.progress_bar)]
