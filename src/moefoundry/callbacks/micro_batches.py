"""Sequences of a forward pass that a run chooses, and chooses anew where memory ends.

A size is on trial for its first batches, and again in each stage of a curriculum. While it is, memory that ends in the
forward or backward pass of any rank makes all ranks halve it and repeat the batch: the same data, the same random
numbers, no gradient of the attempt. Afterwards ranks ask each other no more, and a rank whose memory ends then ends the
run; one that starts it again finds the smaller size. A world of one rank repeats at any time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from moefoundry.callbacks.step_start import StepStart
from moefoundry.config import UserError
from moefoundry.config.curriculum import Stage, stage_at
from moefoundry.retry import (
    MemoryEndedError,
    can_forget,
    left_together,
)

T = TypeVar("T")
KEY = "device_train_microbatch_size"
TRIAL_BATCHES = 3
"""Batches of a size in which ranks look after each other. The second has the optimizer's state beside all gradients;
what comes later differs by where tokens go."""


class MicroBatches(Callback):
    """Sets the size of each batch, logs it as ``device_train_microbatch_size``, and repeats batches with a smaller one.

    Args:
        stages: Stages of the run.
        sizes: Sizes of those whose size the run chooses, by name. Smaller ones are put in their place.
        keep: Keeps the sizes for a run that goes on; called on every rank when they have changed.
        timeout_seconds: Seconds that a rank waits for the answer of the others.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        sizes: dict[str, int],
        keep: Callable[[dict[str, int]], None],
        timeout_seconds: float,
    ) -> None:
        self.stages = stages
        self.sizes = sizes
        self.keep = keep
        self._stage: Stage | None = None
        self._proven = 0
        self._group: torch.distributed.ProcessGroup | None = None
        if torch.distributed.is_initialized() and dist.get_world_size() > 1:
            group = torch.distributed.new_group(timeout=timedelta(seconds=timeout_seconds), backend="gloo")
            assert isinstance(group, torch.distributed.ProcessGroup), "this rank is in it"
            self._group = group

    def batch_start(self, state: State, logger: Logger) -> None:
        stage = stage_at(self.stages, state.timestamp.batch.value)
        if stage is not self._stage:
            self._stage, self._proven = stage, 0
        if stage.name in self.sizes:
            state.device_train_microbatch_size = self.sizes[stage.name]

    def batch_end(self, state: State, logger: Logger) -> None:
        self._proven += 1
        logger.log_metrics({KEY: state.device_train_microbatch_size})

    def repeating(self, state: State, train_batch: Callable[[], T]) -> T:
        """Call ``train_batch`` until memory lasts.

        Raises:
            OutOfMemoryError: It does not last for one sequence.
            UserError: The same, on ranks that had memory.
        """
        assert self._stage is not None, "the batch has begun"
        if self._stage.name not in self.sizes:
            return train_batch()
        start = StepStart(state)
        while True:
            try:
                return train_batch()
            except MemoryEndedError as ended:
                said = str(ended)
            start.restore(state)
            self._halve(state, said)

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Leave forward and backward passes together with the other ranks, while the size is on trial.

        Raises:
            MemoryEndedError: Memory has ended on some rank.
        """
        assert self._stage is not None, "the batch has begun"
        looked_after = self._group is None or self._proven < TRIAL_BATCHES
        if self._stage.name in self.sizes and looked_after and can_forget():
            with left_together(self._group):
                yield
        else:
            yield

    def _halve(self, state: State, said: str) -> None:
        assert self._stage is not None, "the batch has begun"
        size, name = self.sizes[self._stage.name], self._stage.name
        batch, where = state.timestamp.batch.value + 1, f" of stage {name}" if name else ""
        ranks = [number for number, words in enumerate(dist.all_gather_object(said)) if words]
        on = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if size == 1:
            raise torch.OutOfMemoryError(said) if said else UserError(f"batch {batch}: memory ended on {on}")
        self.sizes[name] = state.device_train_microbatch_size = half = -(-size // 2)
        self._proven = 0
        self.keep(self.sizes)
        if dist.get_global_rank() == 0:
            text = f"batch {batch}: memory ended on {on}; it is repeated with {KEY} = {half}{where}, and was {size}"
            print(f"warning: {text}", file=sys.stderr, flush=True)
