"""Says when a run is saved, and when a saved state is put back."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from moefoundry.checkpoint.remote import is_downloaded, origin_of
from moefoundry.checkpoint.run_dir import newest_intact
from moefoundry.checkpoint.save import Saver
from moefoundry.checkpoint.start import Start
from moefoundry.checkpoint.state import RunState
from moefoundry.config import UserError


class Checkpointing(Callback):
    """Saves at intervals and at the end of training, and logs ``checkpoint/stall_seconds``, the time it stood still.

    A save that fails leaves nothing and ends the run on all ranks: at once, or, if it goes on in the background, with a
    warning at once and an error when the next save begins or training ends.

    Args:
        run: The state that is saved and put back.
        saver: Writes checkpoints.
        interval: Time between two (``100ba``); the end of training is always saved.
        in_background: True lets training go on while files are written. The last save is never in the background.
        start: Checkpoint that the run begins with, put back before the first batch. If it is the run's own and turns
            out to be damaged, the newest one before it that is not takes its place.
    """

    def __init__(self, run: RunState, saver: Saver, interval: str, in_background: bool, start: Start | None) -> None:
        self.run = run
        self.saver = saver
        self.in_background = in_background
        self.start = start
        self._is_due = create_interval_scheduler(interval)
        self._saved_batch: int | None = None
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
            self._resume_seconds = self.run.load(state, self.start.checkpoint, self.start.weights_only)
            return
        except UserError as error:  # on every rank
            checkpoint, store = self.start.checkpoint, self.saver.store
            if self.start.own and (uploaded := origin_of(checkpoint)) is not None:
                remedy = f"if moefoundry checkpoint verify {uploaded} finds it damaged, move it away there"
                raise UserError(f"{error}; {remedy}: the run then goes on from the one before it") from error
            intact = newest_intact(store, sizes_only=False) if checkpoint.parent == store.root else checkpoint
            if intact == checkpoint:
                raise
        assert intact is not None, "with none left, newest_intact raises"
        self.start = replace(self.start, checkpoint=intact)
        self._resume_seconds = self.run.load(state, intact, self.start.weights_only)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._waiting_since = time.perf_counter()

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.run.restore_generators()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Put the generators back and log what a resume took, when the first batch has been read.

        Making the loader's iterator draws from the generators. A run that was never interrupted drew before the save,
        so mid-epoch they are put back only now.
        """
        if self.start is None or not self._resume_seconds:
            return
        self.run.restore_generators()
        parts = {**self._resume_seconds, "data_position": time.perf_counter() - self._waiting_since}
        checkpoint, batch = self.start.checkpoint, state.timestamp.batch.value
        resumed = f"resumed from {checkpoint} (batch {batch})"
        begun = f"begun with the weights of {checkpoint}" if self.start.weights_only else resumed
        logger.log_traces({"start": begun})
        logger.log_metrics({f"resume/{part}_seconds": seconds for part, seconds in parts.items()})
        self._resume_seconds = {}
        base = self.start.base
        for directory in {checkpoint, *([base.checkpoint] if base else [])}:
            if dist.get_global_rank() == 0 and is_downloaded(directory):
                shutil.rmtree(directory)  # every rank has read it: loading ends with a collective

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
        ended = state.max_duration is not None and state.timestamp >= state.max_duration
        save = self.saver.start if self.in_background and not ended else self.saver.save
        save(batch, self.run.tensors(state), self.run.document(state), self.run.origin(batch))
