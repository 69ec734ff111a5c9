"""Routing of a step, over all micro-batches and all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from moefoundry.moe.balance import StepCounts, max_violation


class RoutedCounts(Protocol):
    """Routing of a micro-batch, as in :class:`~moefoundry.model.transformer.CausalLMLosses`.

    Attributes:
        tokens_per_expert: int64 [L, E].
        dropped_slots: int64 [L].
        router_entropy: [L], nats.
    """

    @property
    def tokens_per_expert(self) -> Tensor: ...
    @property
    def dropped_slots(self) -> Tensor: ...
    @property
    def router_entropy(self) -> Tensor: ...


class RoutingMonitor(Callback):
    """Logs how evenly tokens are routed.

    - ``moe/max_violation`` and ``moe/router_entropy``: means over MoE layers.
    - ``moe/dropped_fraction``: share of all layers' slots.
    - ``moe/load/layer{i}``: share of slots routed to each of E experts; shares sum to 1.

    Args:
        record: Takes vectors (see :class:`~moefoundry.callbacks.metrics_file.MetricsFile`).
        layers: Index in the model of each layer with experts.
    """

    def __init__(self, record: Callable[[dict[str, Tensor]], None], layers: list[int]) -> None:
        self.record = record
        self.layers = layers
        self._tokens_per_expert_LE: Tensor | None = None
        self._dropped_slots_L: Tensor | None = None
        self._entropy_sum_L: Tensor | None = None

    def after_loss(self, state: State, logger: Logger) -> None:
        self.add(state.outputs)

    def add(self, losses: RoutedCounts) -> None:
        """Count a micro-batch."""
        if self._tokens_per_expert_LE is None or self._dropped_slots_L is None or self._entropy_sum_L is None:
            self._tokens_per_expert_LE = torch.zeros_like(losses.tokens_per_expert)
            self._dropped_slots_L = torch.zeros_like(losses.dropped_slots)
            self._entropy_sum_L = torch.zeros_like(losses.router_entropy)
        self._tokens_per_expert_LE += losses.tokens_per_expert
        self._dropped_slots_L += losses.dropped_slots
        self._entropy_sum_L += losses.router_entropy * losses.tokens_per_expert.sum(dim=-1)

    def batch_end(self, state: State, logger: Logger) -> None:
        counts_LE, dropped_L, entropy_L = self._tokens_per_expert_LE, self._dropped_slots_L, self._entropy_sum_L
        assert counts_LE is not None, "no forward pass in this batch"
        assert dropped_L is not None, "set with the counts"
        assert entropy_L is not None, "set with the counts"
        self._tokens_per_expert_LE, self._dropped_slots_L, self._entropy_sum_L = None, None, None
        if counts_LE.numel() == 0:
            return
        dist.all_reduce(counts_LE)
        dist.all_reduce(dropped_L)
        dist.all_reduce(entropy_L)
        logger.log_metrics(
            {
                "moe/max_violation": max_violation(counts_LE).mean(),
                "moe/router_entropy": (entropy_L / counts_LE.sum(dim=-1)).mean(),
                "moe/dropped_fraction": dropped_L.sum() / counts_LE.sum(),
            }
        )
        load_LE = counts_LE.double() / counts_LE.sum(dim=-1, keepdim=True)
        self.record({f"moe/load/layer{i}": load for i, load in zip(self.layers, load_LE, strict=True)})


class GlobalBatchBalance(Callback):
    """Begins the counts of ``aux_loss_scope: global_batch`` anew with each step."""

    def __init__(self, counts: StepCounts) -> None:
        self.counts = counts

    def batch_start(self, state: State, logger: Logger) -> None:
        self.counts.begin_step()
