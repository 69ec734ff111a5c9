"""Train a recipe: build the trainer (``build.py``), fit, report, close."""

from __future__ import annotations

import platform
import shlex
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed
from composer import Trainer
from composer.core import Time
from composer.utils import dist

from moefoundry.build import build_trainer
from moefoundry.callbacks.checkpointing import Checkpointing
from moefoundry.callbacks.hangs import forget_hangs, watched_for_hangs
from moefoundry.callbacks.health import named_collectives
from moefoundry.callbacks.live_view import LiveView
from moefoundry.callbacks.report import unless_it_fails, write_report
from moefoundry.callbacks.signals import StopOnSignal
from moefoundry.checkpoint.lease import held
from moefoundry.checkpoint.ranks import on_rank_zero
from moefoundry.checkpoint.run_dir import check_run_name, store_of
from moefoundry.composer_patches import MeshTrainer
from moefoundry.config import LocalError, Recipe, advice, flatten
from moefoundry.config.curriculum import stage_at, stages_of
from moefoundry.config.layers import OVERRIDE
from moefoundry.conversion.families import exports_as
from moefoundry.data.loader import dead_processes_named
from moefoundry.evaluation.generation import complete
from moefoundry.mesh import MeshDegrees, resolve_degrees
from moefoundry.model.transformer import MoETransformer
from moefoundry.planning.micro_batch import with_sizes
from moefoundry.planning.shortage import explain, measure, record
from moefoundry.runs.history import add_event
from moefoundry.version import __version__
from moefoundry.world import degrees_of

PACKAGES = {"composer": "mosaicml", "streaming": "mosaicml-streaming"}
"""Packages whose versions the history notes, by the names that they are known under."""

MAX_REASON = 600  # letters of an error that the history keeps

EXPECTED_WARNINGS = (
    r"FSDP2-wrapped module \(FSDPGroupedExperts\) returned a view",  # of emulated BF16; nothing writes to it
    "FSDP2 Config/APIs are experimental",
    "torch.distributed is disabled, unavailable or uninitialized",
    "Cannot split (tensor|list) of length",  # the last, smaller batch of the held-out split
    "No batches were evaluated",  # by Composer, where a recipe has only tasks: icl_tasks without eval_loader
    "No batches were trained",  # in the rest of an epoch of which nothing is left to a resumed run
)
"""About choices that are made here on purpose; a person at the console can do nothing about them."""


def train(recipe: Recipe, command: Sequence[str] = (), origins: Mapping[str, str] | None = None) -> Trainer:
    """Train as the recipe says, in every rank of the launched world.

    Args:
        recipe: Recipe of the run.
        command: The command that started this process; the report says how to go on with it.
        origins: File or override that each key comes from, for the run's history.

    Raises:
        UserError: The run cannot start or go on, for a reason that the user can put right.
    """
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    run_dir = Path(recipe.run_dir)
    with sole_owner(run_dir), named_collectives(recipe.dist_timeout), dead_processes_named():
        if (origins or {}).get("run_dir") != OVERRIDE:
            on_rank_zero(lambda: check_run_name(recipe))
        if dist.get_global_rank() == 0:
            forget_hangs(run_dir)
        trainer = build_trainer(recipe)
        recipe = trainer.recipe
        if dist.get_global_rank() == 0:
            for problem in advice(recipe):
                print(f"warning: {problem}", file=sys.stderr, flush=True)
        trainer.logger.log_hyperparameters(flatten(recipe))
        timestamp, max_duration = trainer.state.timestamp, trainer.state.max_duration
        if max_duration is None or timestamp < max_duration:
            if dist.get_global_rank() == 0 and recipe.log_to_console:
                print(f"export: {exports_as(recipe.model)}", file=sys.stderr, flush=True)
            with (
                view_ended(trainer),
                noted(trainer, recipe, command, origins or {}),
                watched_for_hangs(run_dir, recipe.dist_timeout) if dist.get_world_size() > 1 else nullcontext(),
                explained_shortage(trainer),
            ):
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


@contextmanager
def view_ended(trainer: Trainer) -> Iterator[None]:
    """Give the terminal back when training has ended, before an error or a report is printed."""
    try:
        yield
    finally:
        for destination in trainer.logger.destinations:
            if isinstance(destination, LiveView):
                destination.end()


@contextmanager
def noted(trainer: MeshTrainer, recipe: Recipe, command: Sequence[str], origins: Mapping[str, str]) -> Iterator[None]:
    """Note in the run's history, on rank 0, that training begins, and how it ends."""
    if dist.get_global_rank() != 0:
        yield
        return
    run_dir, timestamp = Path(recipe.run_dir), trainer.state.timestamp
    (checkpointing,) = (callback for callback in trainer.state.callbacks if isinstance(callback, Checkpointing))
    add_event(
        run_dir,
        "start",
        batch=timestamp.batch.value,
        **{"from": str(checkpointing.start.checkpoint) if checkpointing.start else ""},
        **environment(degrees_of(recipe)),
        command=shlex.join(command),
        origins={key: origin for key, origin in origins.items() if origin != "default"},
    )
    state, reason = "failed", ""
    try:
        yield
        signum = stopped_by(trainer)
        state, reason = ("finished", ended_early(trainer)) if signum is None else ("stopped", f"by {signum.name}")
        if signum is None and reason:
            print(f"note: {reason}", file=sys.stderr, flush=True)
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]
        raise
    finally:
        add_event(run_dir, "end", batch=trainer.state.timestamp.batch.value, state=state, reason=reason)


@contextmanager
def explained_shortage(trainer: MeshTrainer) -> Iterator[None]:
    """Put the plan of memory beside what was used, where memory ends.

    Raises:
        LocalError: In place of ``torch.OutOfMemoryError``, on the ranks that have met it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        state, recipe, rank = trainer.state, trainer.recipe, dist.get_global_rank()
        said = " ".join(str(error).split()).partition(" If reserved")[0]
        if state.dataloader_label != "train":
            cure = f"take a smaller device_eval_batch_size than {recipe.device_eval_batch_size}"
            raise LocalError(f"memory ended on rank {rank} in an evaluation: {said}; {cure}") from None
        used = measure(state.model, state.optimizers[0], state.device.tensor_to_device(torch.empty(0)).device)
        batch, size = state.timestamp.batch.value, state.device_train_microbatch_size
        stage = stage_at(stages_of(recipe), batch)
        recipe = with_sizes(recipe, {stage.name: int(size or 1)})
        degrees = resolve_degrees(recipe.mesh, dist.get_world_size(), dist.get_local_world_size())
        record(Path(recipe.run_dir), rank, recipe, batch, int(size or 1), used)
        text = explain(recipe, degrees, batch, used)
        raise LocalError(f"batch {batch + 1}: memory ended on rank {rank}: {said}\n{text}") from None


def environment(degrees: MeshDegrees) -> dict[str, Any]:
    """Describe ranks, devices and versions of this run."""
    on_gpu = torch.cuda.is_available()
    mesh = {"replicate": degrees.replicate, "shard": degrees.shard, "expert": degrees.expert}
    versions = {"moefoundry": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: version(package) for name, package in PACKAGES.items()}
    versions |= {"cuda": str(torch.version.cuda)} if on_gpu else {}
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    parts = {"host": socket.gethostname(), "world_size": dist.get_world_size(), "mesh": mesh, "device": device}
    return {**parts, "versions": versions}


def report(recipe: Recipe, model: MoETransformer, command: Sequence[str]) -> None:
    """Write the report of a finished run; every rank calls it.

    A part that fails is named on standard error, and the run is finished still.
    """
    cfg, completion = recipe.callbacks.report, None
    assert cfg is not None, "the caller has asked for it"
    if cfg.prompt is not None:
        with unless_it_fails("completion"):
            completion = complete(model, Path(recipe.tokenizer.name), cfg.prompt, cfg.max_new_tokens)
    if dist.get_global_rank() == 0:
        write_report(recipe, completion, command)


@contextmanager
def sole_owner(run_dir: Path) -> Iterator[None]:
    """Hold the lease of ``run_dir`` on rank 0.

    Raises:
        UserError: Another run has it: on all ranks, or, where there is no process group yet, on rank 0.
    """
    with ExitStack() as stack:
        if torch.distributed.is_initialized() or dist.get_global_rank() == 0:
            on_rank_zero(lambda: stack.enter_context(held(run_dir)))
        yield


def ended_early(trainer: MeshTrainer) -> str:
    """Say that a callback ended training before ``max_duration``; empty if none did."""
    state, wanted = trainer.state, Time.from_timestring(trainer.recipe.max_duration)
    if state.timestamp.get(wanted.unit) >= wanted:
        return ""
    batch = state.timestamp.batch.value
    return f"a callback ended training after batch {batch}, before max_duration, {trainer.recipe.max_duration}"


def stopped_by(trainer: Trainer) -> signal.Signals | None:
    """Give the signal that ended a run before its end."""
    (stop,) = (callback for callback in trainer.state.callbacks if isinstance(callback, StopOnSignal))
    return stop.stopped_by
