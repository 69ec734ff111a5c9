"""Balancing without a loss: after an optimizer step, every expert's bias moves against the load it had in the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from moefoundry.callbacks.health import step_was_skipped
from moefoundry.moe.balance import expert_bias_step
from moefoundry.moe.router import Router


class ExpertBias(Callback):
    """Moves ``expert_bias`` by ``rate * sign(mean load - load)`` and logs ``moe/expert_bias_max_abs``.

    The load is that of all micro-batches and ranks. It is read from the losses, which a forward pass returns once
    however often activation checkpointing repeats its parts.

    Args:
        routers: With a bias, one for each row of the losses' ``tokens_per_expert``.
        rate: ``bias_update_rate``.
        freeze_at: Batches that begin at or after this time (``180ba``) change nothing; None never freezes.
    """

    def __init__(self, routers: Sequence[Router], rate: float, freeze_at: str | None) -> None:
        self.routers = routers
        self.rate = rate
        self.freeze_at = None if freeze_at is None else Time.from_timestring(freeze_at)
        self._tokens_per_expert_LE: Tensor | None = None

    def after_loss(self, state: State, logger: Logger) -> None:
        counts_LE = state.outputs.tokens_per_expert
        before_LE = self._tokens_per_expert_LE
        self._tokens_per_expert_LE = counts_LE.clone() if before_LE is None else before_LE + counts_LE

    def batch_end(self, state: State, logger: Logger) -> None:
        counts_LE, self._tokens_per_expert_LE = self._tokens_per_expert_LE, None
        assert counts_LE is not None, "no forward pass in this batch"
        assert state.previous_timestamp is not None, "set before every batch_end"
        biases = [router.expert_bias for router in self.routers if router.expert_bias is not None]
        frozen = self.freeze_at is not None and state.previous_timestamp >= self.freeze_at
        if not frozen and not step_was_skipped(state.model):
            dist.all_reduce(counts_LE)
            for bias_E, step_E in zip(biases, expert_bias_step(counts_LE, self.rate), strict=True):
                bias_E += step_E
        logger.log_metrics({"moe/expert_bias_max_abs": torch.stack(biases).abs().max()})
