"""Saves the state of a run at intervals and at its end, and puts a saved state back."""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from moefoundry.callbacks.ema import Ema
from moefoundry.checkpoint import io
from moefoundry.checkpoint.async_save import Saver
from moefoundry.checkpoint.load import load, read_index
from moefoundry.checkpoint.manifest import Origin, damage, recipe_digest
from moefoundry.checkpoint.ranks import on_rank_zero
from moefoundry.checkpoint.remote import is_downloaded, upload_checkpoint
from moefoundry.checkpoint.run_dir import newest_without
from moefoundry.checkpoint.state import (
    derived_rng_tensors,
    model_tensors,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
    to_jsonable,
)
from moefoundry.checkpoint.store import CheckpointStore, Retention
from moefoundry.checkpoint.writer import saying
from moefoundry.config import UserError


class Checkpointing(Callback):
    """Writes ``ba{batch}`` under ``store`` and logs ``checkpoint/stall_seconds``, the time that training stood still.

    A save that fails leaves nothing and ends the run on all ranks: at once, or, if it goes on in the background, with a
    warning at once and an error when the next save begins or training ends.

    Args:
        store: Where checkpoints go.
        interval: Time between two (``100ba``); the end of training is always saved.
        in_background: Whether training goes on while files are written. The last save is never in the background.
        retention: Which checkpoints are kept.
        mesh: Degrees of its axes, by name; noted in the manifest.
        metric: Value of a metric in this batch, by name, if it has been measured.
        recipe: The run's recipe as a plain mapping; a reader compares the model with its own.
        resume_from: The checkpoint this run continues, read before the first batch. If it is one of ``store`` and turns
            out to be damaged, the newest one before it that is not.
        remote: URL that checkpoints are also uploaded to.
        ema: What averages the parameters, if anything does.
    """

    def __init__(
        self,
        store: CheckpointStore,
        interval: str,
        in_background: bool,
        retention: Retention,
        mesh: dict[str, int],
        metric: Callable[[str], float | None],
        recipe: dict[str, Any],
        resume_from: Path | None,
        remote: str | None,
        ema: Ema | None,
    ) -> None:
        self.in_background = in_background
        self.retention = retention
        self.mesh = mesh
        self.metric = metric
        self.saver = Saver(store, self._published)
        self.recipe = recipe
        self.resume_from = resume_from
        self.remote = remote
        self.ema = ema
        self._is_due = create_interval_scheduler(interval)
        self._saved_batch: int | None = None
        self._rng: dict[str, Tensor] = {}
        self._resume_seconds: dict[str, float] = {}
        self._waiting_since = 0.0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self._is_due(state, event):
            start = time.perf_counter()
            self.save(state)
            logger.log_metrics({"checkpoint/stall_seconds": time.perf_counter() - start})

    def after_load(self, state: State, logger: Logger) -> None:
        if self.resume_from is None:
            return
        try:
            self.load(state, self.resume_from)
            return
        except UserError:  # on every rank
            store = self.saver.store
            intact = newest_without(damage, store) if self.resume_from.parent == store.root else self.resume_from
            if intact == self.resume_from:
                raise
            self.resume_from = intact
        assert self.resume_from is not None, "with none left, newest_without raises"
        self.load(state, self.resume_from)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._waiting_since = time.perf_counter()

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._restore_rng()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Making the loader's iterator draws from the generators; a run that was never interrupted drew before the
        save, so mid-epoch the state is put back only now."""
        self._restore_rng()
        if self._resume_seconds:
            parts = {**self._resume_seconds, "data_position": time.perf_counter() - self._waiting_since}
            logger.log_traces({"resumed_from": f"{self.resume_from} (batch {state.timestamp.batch.value})"})
            logger.log_metrics({f"resume/{part}_seconds": seconds for part, seconds in parts.items()})
            self._resume_seconds = {}
            if dist.get_global_rank() == 0 and self.resume_from is not None and is_downloaded(self.resume_from):
                shutil.rmtree(self.resume_from)  # every rank has read it: loading ends with a collective

    def fit_end(self, state: State, logger: Logger) -> None:
        self.saver.finish()

    def close(self, state: State, logger: Logger) -> None:
        self.saver.close()

    def save(self, state: State) -> None:
        """Save ``state``, unless that has been done in this batch.

        Raises:
            UserError: There is such a checkpoint of an earlier run; or this save or the one before it failed, or what
                follows a save (deleting older ones, uploading) did.
        """
        batch = state.timestamp.batch.value
        if self._saved_batch == batch:
            return
        self._saved_batch = batch
        tensors = {
            **model_tensors(state.model),
            **optimizer_tensors(state.model, state.optimizers[0]),
            **rng_tensors(dist.get_global_rank()),
            **(self.ema.tensors() if self.ema else {}),
        }
        ended = state.max_duration is not None and state.timestamp >= state.max_duration
        save = self.saver.start if self.in_background and not ended else self.saver.save
        save(batch, tensors, self._document(state), self._origin(batch))

    def _origin(self, batch: int) -> Origin:
        best = self.retention.best
        value = self.metric(best) if best is not None else None
        metrics = {} if best is None or value is None else {best: value}
        return Origin(batch, self.mesh, dist.get_world_size(), recipe_digest(self.recipe), metrics)

    def _published(self, checkpoint: Path) -> None:
        """Rank 0 does this, when a checkpoint has its final name."""
        with saying(f"checkpoint {checkpoint.name} was saved, but those that it replaces were not deleted"):
            self.saver.store.retain(self.retention)
        if self.remote is not None:
            with saying(f"checkpoint {checkpoint.name} was saved, but not uploaded"):
                upload_checkpoint(checkpoint, self.remote)

    def load(self, state: State, checkpoint: Path) -> None:
        """Put a saved state back into ``state``: weights, optimizer, schedule, position in the data, generators. Of a
        weights-only checkpoint, weights alone: the run begins at its first batch.

        A rank that the checkpoint knows gets its own generators; any further rank gets new ones, derived from the seed,
        the batch and the rank.
        """
        document, index = on_rank_zero(lambda: io.read_state(checkpoint)), read_index(checkpoint)
        model = model_tensors(state.model)
        if document.get(io.WEIGHTS_ONLY):
            buffers = {f"model/{name}" for name, _ in state.model.named_buffers()}
            # A buffer that it lacks, such as the expert bias of a softmax router, starts as in any new run.
            wanted = {name: tensor for name, tensor in model.items() if name in index.shapes or name not in buffers}
            report = load(index, wanted)
            self._resume_seconds = {"store": report.store_seconds, "exchange": report.exchange_seconds}
            return
        start = time.perf_counter()
        optimizer = optimizer_tensors(state.model, state.optimizers[0])
        optimizer_seconds = time.perf_counter() - start
        timestamp, rank = document["timestamp"], dist.get_global_rank()
        if rank < document["world_size"]:
            own = {name: tensor for name, tensor in rng_tensors(rank).items() if name in index.shapes}
            self._rng = own
        else:
            own = {}
            self._rng = derived_rng_tensors(rank, int(self.recipe["seed"]), timestamp["batch"])
        averages = self.ema.continued(index) if self.ema else {}
        report = load(index, {**model, **optimizer, **averages}, own)
        self._resume_seconds = {
            "store": report.store_seconds,
            "exchange": report.exchange_seconds,
            "optimizer": optimizer_seconds,
        }
        seconds = {key: datetime.timedelta(seconds=value) for key, value in timestamp.items() if key.endswith("_wct")}
        state.timestamp.load_state_dict({**timestamp, **seconds})
        for scheduler, saved in zip(state.schedulers, document["schedulers"], strict=True):
            _restore_schedule(scheduler, saved)
        assert state.train_dataloader is not None, "set before AFTER_LOAD"
        state.train_dataloader.dataset.load_state_dict(document["data"])
        state.dataset_resumption["train"] = True

    def _document(self, state: State) -> dict[str, Any]:
        assert state.train_dataloader is not None, "training has begun"
        data = state.train_dataloader.dataset.state_dict(state.timestamp.sample_in_epoch.value, True)
        return {
            "timestamp": to_jsonable(state.timestamp.state_dict()),
            "schedulers": [scheduler.state_dict() for scheduler in state.schedulers],
            "data": {**data, "epoch": state.timestamp.epoch.value},
            "world_size": dist.get_world_size(),
            "recipe": self.recipe,
        }

    def _restore_rng(self) -> None:
        if self._rng:
            restore_rng(self._rng, dist.get_global_rank())
            self._rng = {}


def _restore_schedule(scheduler: Any, saved: dict[str, Any]) -> None:
    """Put a schedule back. Its parameter groups may be fewer or more on another mesh, but have one learning rate."""
    rate, groups = saved["_last_lr"][0], scheduler.optimizer.param_groups
    own = {name: scheduler.state_dict()[name] for name in ("base_lrs", "lr_lambdas")}
    scheduler.load_state_dict({**saved, **own, "_last_lr": [rate] * len(groups)})
    for group in groups:
        group["lr"] = rate
