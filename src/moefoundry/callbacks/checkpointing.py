"""Saves the state of a run at intervals and at its end, and puts a saved state back."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from moefoundry.checkpoint import io
from moefoundry.checkpoint.state import model_tensors, optimizer_tensors, restore_rng, rng_tensors, to_jsonable
from moefoundry.checkpoint.store import CheckpointStore


class Checkpointing(Callback):
    """Writes ``ba{batch}`` under ``store`` and logs ``checkpoint/stall_seconds``, the time that training waited.

    Args:
        store: Where checkpoints go.
        interval: Time between two (``100ba``); the end of training is always saved.
        keep: Newest checkpoints kept; -1 keeps all.
        recipe: The run's recipe as a plain mapping; a reader compares the model with its own.
        resume_from: The checkpoint this run continues, read before the first batch.
    """

    def __init__(
        self, store: CheckpointStore, interval: str, keep: int, recipe: dict[str, Any], resume_from: Path | None
    ) -> None:
        self.store = store
        self.keep = keep
        self.recipe = recipe
        self.resume_from = resume_from
        self._is_due = create_interval_scheduler(interval)
        self._rng: dict[str, Tensor] = {}

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self._is_due(state, event):
            start = time.perf_counter()
            self.save(state)
            logger.log_metrics({"checkpoint/stall_seconds": time.perf_counter() - start})

    def after_load(self, state: State, logger: Logger) -> None:
        if self.resume_from is not None:
            self.load(state, self.resume_from)

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._restore_rng()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Making the loader's iterator draws from the generators; a run that was never interrupted drew before the
        save, so mid-epoch the state is put back only now."""
        self._restore_rng()

    def save(self, state: State) -> None:
        """Write a checkpoint of ``state``, unless this batch has one."""
        batch = state.timestamp.batch.value
        if self.store.path(batch).exists():
            return
        if dist.get_global_rank() == 0:
            self.store.begin(batch)
        dist.barrier()
        tensors = {
            **model_tensors(state.model),
            **optimizer_tensors(state.model, state.optimizers[0]),
            **rng_tensors(dist.get_global_rank()),
        }
        io.write(self.store.staging_path(batch), tensors, self._document(state))
        dist.barrier()
        if dist.get_global_rank() == 0:
            self.store.publish(batch)
            self.store.retain(self.keep)
        dist.barrier()

    def load(self, state: State, checkpoint: Path) -> None:
        """Put a saved state back into ``state``: weights, optimizer, schedule, position in the data, generators. Of a
        weights-only checkpoint, weights alone: the run begins at its first batch."""
        document = io.read_state(checkpoint)
        if document.get(io.WEIGHTS_ONLY):
            stored, buffers = io.stored_shapes(checkpoint), {f"model/{name}" for name, _ in state.model.named_buffers()}
            tensors = model_tensors(state.model).items()
            # A buffer that it lacks, such as the expert bias of a softmax router, starts as in any new run.
            io.read_into(checkpoint, {name: t for name, t in tensors if name in stored or name not in buffers})
            return
        self._rng = (
            {name: tensor.clone() for name, tensor in rng_tensors(dist.get_global_rank()).items()}
            if document["world_size"] == dist.get_world_size()
            else {}
        )
        io.read_into(
            checkpoint,
            {**model_tensors(state.model), **optimizer_tensors(state.model, state.optimizers[0]), **self._rng},
        )
        timestamp = document["timestamp"]
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
