"""The data of each batch: the time that training waits for them, their padding, and their sources."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist


class DataMonitor(Callback):
    """Logs ``data/wait_seconds`` of every batch, ``data/padding``, ``tokens/SOURCE`` and ``loss/train/source/SOURCE``.

    The time is that until every rank has its batch. ``data/padding`` is the share of positions without a token, where
    rows may have such. ``tokens/SOURCE`` counts the tokens of a source from the beginning of the run. The loss is the
    mean cross entropy over the targets of a source in the global batch; there is none where the batch has none of it.

    Args:
        sources: Names of the streams, in the order in which batches number them; empty if there is one without a name.
        tokens: Tokens of each source so far, which is counted on.
    """

    def __init__(self, sources: Sequence[str], tokens: dict[str, int]) -> None:
        self.sources = sources
        self.tokens = tokens
        self._start = 0.0
        self._sums = torch.zeros(2, len(sources), dtype=torch.float64)  # of losses and of targets, by source

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

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._sums.zero_()

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add up the losses of a micro-batch."""
        if self.sources:
            self._sums = self._sums.to(state.batch["source"].device)
            of_rows = torch.stack([state.outputs.lm_of_rows, state.batch["num_targets"]]).double()
            self._sums.index_add_(1, state.batch["source"], of_rows)

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.sources:
            return
        dist.all_reduce(self._sums)
        for source, (loss, targets) in zip(self.sources, self._sums.T.tolist(), strict=True):
            if targets:
                logger.log_metrics({f"loss/train/source/{source}": loss / targets})
