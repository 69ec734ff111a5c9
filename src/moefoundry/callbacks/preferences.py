"""Rewards of the pairs of a step, over all micro-batches and all ranks."""

from __future__ import annotations

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor


class PreferenceMonitor(Callback):
    """Logs ``preference/margin``, the mean reward margin, and ``preference/accuracy``, the share above 0."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # margins, pairs with one above 0, pairs

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._sums = None

    def after_loss(self, state: State, logger: Logger) -> None:
        margins_B = state.model.margins(state.outputs, state.batch).detach().double()
        right = (margins_B > 0).double().sum()
        sums = torch.stack([margins_B.sum(), right, torch.ones_like(margins_B).sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def batch_end(self, state: State, logger: Logger) -> None:
        sums = self._sums
        assert sums is not None, "no forward pass in this batch"
        dist.all_reduce(sums)
        margin, right, pairs = sums.tolist()
        logger.log_metrics({"preference/margin": margin / pairs, "preference/accuracy": right / pairs})
