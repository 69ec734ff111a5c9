"""Divergence of the indexers' choice in a step, over all micro-batches and all ranks."""

from __future__ import annotations

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor


class IndexerMonitor(Callback):
    """Logs ``indexer/kl``, in nats, a mean over tokens and layers."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of samples' divergences, and of samples

    def after_loss(self, state: State, logger: Logger) -> None:
        kl_L, samples = state.outputs.indexer_kl, len(state.batch["input_ids"])
        assert kl_L is not None, "an indexer learns"
        sums = torch.stack([kl_L.detach().double().mean() * samples, kl_L.new_tensor(samples).double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def batch_end(self, state: State, logger: Logger) -> None:
        sums, self._sums = self._sums, None
        assert sums is not None, "no forward pass in this batch"
        dist.all_reduce(sums)
        kl, samples = sums.tolist()
        logger.log_metrics({"indexer/kl": kl / samples})
