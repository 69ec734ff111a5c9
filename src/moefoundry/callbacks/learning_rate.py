"""The learning rate of each batch, computed from the recipe and the position alone: no state, so nothing to restore.

Composer evaluates a schedule where training has come to when a batch has ended, and one batch late at that: batch n,
counted from 1, gets the value at n - 2 batches. So the first two batches of a warm-up have a rate of 0, and the last
batch is short of the end. Here batch n has the value at n batches: the warm-up begins above 0, and the last batch has
the final rate. ``scheduler.timing: composer`` keeps Composer's and LLM Foundry's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from composer.core import Callback, State, Timestamp
from composer.loggers import Logger
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from composer.utils import dist

from moefoundry.config import (
    ConstantWithWarmupConfig,
    CosineWithWarmupConfig,
    LinearDecayWithWarmupConfig,
    Recipe,
    SchedulerConfig,
    ScheduleTiming,
)
from moefoundry.config.curriculum import stage_at, stages_of
from moefoundry.config.making import make_part


class LearningRate(Callback):
    """Sets the rate before each batch.

    Args:
        recipe: Recipe of the run.
        changes: Differences from the schedule of the checkpoint that the run continues, for a line with the first rate;
            empty if there are none.
    """

    def __init__(self, recipe: Recipe, changes: str = "") -> None:
        self.peak = recipe.optimizer.lr
        self.timing = recipe.scheduler.timing
        self.schedule = build_schedule(recipe.scheduler)
        self.stages = stages_of(recipe)
        self._changes = changes

    def batch_start(self, state: State, logger: Logger) -> None:
        rate = self.rate(state)
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
        if self._changes and dist.get_global_rank() == 0:
            batch = state.timestamp.batch.value + 1
            text = f"note: the learning rate of batch {batch} is {rate:.4g}, by this recipe's schedule; {self._changes}"
            print(text, file=sys.stderr, flush=True)
        self._changes = ""

    def rate(self, state: State) -> float:
        """Compute the rate of the batch that follows ``state.timestamp``.

        A last, smaller batch of an epoch counts as a whole one.
        """
        now = state.timestamp
        if self.timing == ScheduleTiming.batch_end:
            stage = stage_at(self.stages, now.batch.value)
            position = now.to_next_batch(stage.batch_size, stage.tokens_per_batch)
        else:
            stage = stage_at(self.stages, now.batch.value - 1)
            position = now.copy(
                batch=max(0, now.batch.value - 1),
                sample=max(0, now.sample.value - stage.batch_size),
                token=max(0, now.token.value - stage.tokens_per_batch),
            )
        return self.peak * self.schedule(cast(State, _StateAt(state, position)))


class _StateAt:
    """Composer's ``State``, at another position of the run."""

    def __init__(self, state: State, timestamp: Timestamp) -> None:
        self._state, self.timestamp = state, timestamp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    get_elapsed_duration = State.get_elapsed_duration


def build_schedule(cfg: SchedulerConfig) -> Callable[[State], float]:
    """Build the function from the position to the share of the peak rate.

    Raises:
        UserError: It cannot be built.
    """
    schedule: Callable[[State], float] = make_part("schedulers", cfg.name, "scheduler", cfg)
    return schedule


def cosine(cfg: CosineWithWarmupConfig) -> ComposerScheduler:
    """Build half a cosine from the peak to ``alpha_f`` of it."""
    return CosineAnnealingWithWarmupScheduler(t_warmup=cfg.t_warmup, alpha_f=cfg.alpha_f)


def linear(cfg: LinearDecayWithWarmupConfig) -> ComposerScheduler:
    """Build a line from the peak to ``alpha_f`` of it."""
    return LinearWithWarmupScheduler(t_warmup=cfg.t_warmup, alpha_f=cfg.alpha_f)


def constant(cfg: ConstantWithWarmupConfig) -> ComposerScheduler:
    """Build a rate that stays at the peak."""
    return ConstantWithWarmupScheduler(t_warmup=cfg.t_warmup)
