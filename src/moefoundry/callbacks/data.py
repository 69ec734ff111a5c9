"""The data of each batch: how long training waits for them, how much is padding, and which source they are of."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist


class DataMonitor(Callback):
    """Logs ``data/wait_seconds`` of every batch, ``data/padding`` and ``tokens/SOURCE``.

    The time is that until every rank has its batch. ``data/padding`` is the share of positions without a token, where
    rows may have such. ``tokens/SOURCE`` counts the tokens of a source from the beginning of the run.

    Args:
        sources: Names of the streams, in the order in which batches number them; empty if there is one without a name.
        tokens: Tokens of each source so far, which is counted on.
    """

    def __init__(self, sources: Sequence[str], tokens: dict[str, int]) -> None:
        self.sources = sources
        self.tokens = tokens
        self._start = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._start = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"data/wait_seconds": time.perf_counter() - self._start})

    def batch_start(self, state: State, logger: Logger) -> None:
        if "sequence_id" not in state.batch and not self.sources:
            return
        tokens_B = torch.full((len(state.batch["input_ids"]),), state.batch["input_ids"].shape[1])
        if "sequence_id" in state.batch:
            tokens_B = (state.batch["sequence_id"] >= 0).sum(dim=1)
        counts = torch.zeros(2 + len(self.sources), dtype=torch.int64)
        counts[0], counts[1] = tokens_B.sum(), state.batch["input_ids"].numel()
        if self.sources:
            counts[2:].index_add_(0, state.batch["source"], tokens_B)
        counts = state.device.tensor_to_device(counts)
        dist.all_reduce(counts)
        tokens, positions, *of_sources = counts.tolist()
        if "sequence_id" in state.batch:
            logger.log_metrics({"data/padding": 1 - tokens / positions})
        for source, number in zip(self.sources, of_sources, strict=True):
            self.tokens[source] = self.tokens.get(source, 0) + number
            logger.log_metrics({f"tokens/{source}": self.tokens[source]})
