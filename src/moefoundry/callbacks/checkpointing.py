"""Saves the state of a run at intervals and at its end, and puts a saved state back."""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from moefoundry.callbacks.ema import Ema
from moefoundry.checkpoint.async_save import Saver
from moefoundry.checkpoint.document import read_state
from moefoundry.checkpoint.load import load, read_index
from moefoundry.checkpoint.manifest import Origin, damage, recipe_digest
from moefoundry.checkpoint.ranks import on_rank_zero
from moefoundry.checkpoint.remote import is_downloaded, upload_checkpoint
from moefoundry.checkpoint.run_dir import newest_without
from moefoundry.checkpoint.start import Start
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
        data_digests: Digests of the run's data, which each checkpoint keeps.
        start: What the run begins with, read before the first batch. If that is one of ``store`` and turns out to be
            damaged, the newest one before it that is not.
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
        data_digests: Mapping[str, str],
        start: Start | None,
        remote: str | None,
        ema: Ema | None,
    ) -> None:
        self.in_background = in_background
        self.retention = retention
        self.mesh = mesh
        self.metric = metric
        self.saver = Saver(store, self._published)
        self.recipe = recipe
        self.data_digests = data_digests
        self.start = start
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
        if self.start is None:
            return
        try:
            self.load(state, self.start)
            return
        except UserError:  # on every rank
            checkpoint, store = self.start.checkpoint, self.saver.store
            intact = newest_without(damage, store) if checkpoint.parent == store.root else checkpoint
            if intact == checkpoint:
                raise
        assert intact is not None, "with none left, newest_without raises"
        self.start = replace(self.start, checkpoint=intact)
        self.load(state, self.start)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._waiting_since = time.perf_counter()

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._restore_rng()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Making the loader's iterator draws from the generators; a run that was never interrupted drew before the
        save, so mid-epoch the state is put back only now."""
        self._restore_rng()
        if self.start is not None and self._resume_seconds:
            parts = {**self._resume_seconds, "data_position": time.perf_counter() - self._waiting_since}
            checkpoint, batch = self.start.checkpoint, state.timestamp.batch.value
            resumed = f"resumed from {checkpoint} (batch {batch})"
            begun = f"begun with the weights of {checkpoint}" if self.start.weights_only else resumed
            logger.log_traces({"start": begun})
            logger.log_metrics({f"resume/{part}_seconds": seconds for part, seconds in parts.items()})
            self._resume_seconds = {}
            if dist.get_global_rank() == 0 and is_downloaded(checkpoint):
                shutil.rmtree(checkpoint)  # every rank has read it: loading ends with a collective

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

    def load(self, state: State, start: Start) -> None:
        """Put a saved state back into ``state``: weights, averages of them, optimizer, position in the data and
        generators; or weights and averages alone.

        A buffer that the checkpoint lacks, such as the expert bias of a softmax router, starts as in any new run. A
        rank that the checkpoint knows gets its own generators; any further rank gets new ones, derived from the seed,
        the batch and the rank.
        """
        document, index = on_rank_zero(lambda: read_state(start.checkpoint)), read_index(start.checkpoint)
        stored, buffers = index.shapes, {f"model/{name}" for name, _ in state.model.named_buffers()}
        model = model_tensors(state.model)
        tensors = {name: tensor for name, tensor in model.items() if name in stored or name not in buffers}
        tensors |= self.ema.continued(index) if self.ema else {}
        if start.weights_only:
            report, seconds = load(index, tensors), {}
        else:
            begun = time.perf_counter()
            tensors |= optimizer_tensors(state.model, state.optimizers[0])
            seconds = {"optimizer": time.perf_counter() - begun}
            report = load(index, tensors, self._own_rng(document, stored))
            _restore_position(state, document)
        self._resume_seconds = {"store": report.store_seconds, "exchange": report.exchange_seconds, **seconds}

    def _own_rng(self, document: dict[str, Any], stored: Collection[str]) -> dict[str, Tensor]:
        """This rank's generators, to be read; set aside for the first batch, read or derived."""
        rank = dist.get_global_rank()
        if rank < document["world_size"]:
            self._rng = {name: tensor for name, tensor in rng_tensors(rank).items() if name in stored}
            return self._rng
        self._rng = derived_rng_tensors(rank, int(self.recipe["seed"]), document["timestamp"]["batch"])
        return {}

    def _document(self, state: State) -> dict[str, Any]:
        assert state.train_dataloader is not None, "training has begun"
        data = state.train_dataloader.dataset.state_dict(state.timestamp.sample_in_epoch.value, True)
        return {
            "timestamp": to_jsonable(state.timestamp.state_dict()),
            "lr": state.optimizers[0].param_groups[0]["lr"],
            "data": {**data, "epoch": state.timestamp.epoch.value},
            "data_digests": dict(self.data_digests),
            "world_size": dist.get_world_size(),
            "recipe": self.recipe,
        }

    def _restore_rng(self) -> None:
        if self._rng:
            restore_rng(self._rng, dist.get_global_rank())
            self._rng = {}


def _restore_position(state: State, document: dict[str, Any]) -> None:
    """Let training and its data go on where they were."""
    timestamp = document["timestamp"]
    seconds = {key: datetime.timedelta(seconds=value) for key, value in timestamp.items() if key.endswith("_wct")}
    state.timestamp.load_state_dict({**timestamp, **seconds})
    assert state.train_dataloader is not None, "set before AFTER_LOAD"
    state.train_dataloader.dataset.load_state_dict(document["data"])
    state.dataset_resumption["train"] = True
