"""``callbacks: {moe_routing_monitor: {}}`` of a recipe of LLM Foundry, found by the entry points of this package."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from composer.core import State
from composer.loggers import Logger
from torch import Tensor, nn

from moefoundry.callbacks.routing import RoutingMonitor
from moefoundry.config import UserError
from moefoundry.llm_foundry.mpt import FFN_TYPE, MoEFFN
from moefoundry.model.transformer import MoETransformer
from moefoundry.parallel import moe_layer_indices


class _Counts(NamedTuple):
    tokens_per_expert: Tensor
    dropped_slots: Tensor
    router_entropy: Tensor


class FoundryRoutingMonitor(RoutingMonitor):
    """Logs how evenly tokens are routed, in an MPT with ``ffn_type: moefoundry_moe`` and in ``moe_causal_lm``.

    The metrics are those of :class:`RoutingMonitor`; in place of the vector of an MoE layer's loads,
    ``moe/max_load/layer{i}``: the largest of the shares that its experts have of the slots.

    Raises:
        UserError: When training begins: the model has no such experts.
    """

    def __init__(self) -> None:
        super().__init__(record=lambda loads: None, layers=[])
        self._ffns: list[MoEFFN] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        self._ffns, self.layers = _moe_layers(state.model)
        if not self.layers:
            raise UserError(f"callbacks.moe_routing_monitor: the model has no experts of ffn_type {FFN_TYPE}")
        self.record = lambda loads: logger.log_metrics(
            {name.replace("load", "max_load", 1): shares.max() for name, shares in loads.items()}
        )

    def after_loss(self, state: State, logger: Logger) -> None:
        if not self._ffns:
            return super().after_loss(state, logger)
        stats = [ffn.routing for ffn in self._ffns if ffn.routing is not None]
        columns = ([getattr(layer, name).detach() for layer in stats] for name in _Counts._fields)
        return self.add(_Counts(*map(torch.stack, columns)))


def _moe_layers(model: nn.Module) -> tuple[list[MoEFFN], list[int]]:
    """Find the MoE layers of an MPT, none in ``moe_causal_lm``; and the number of each in the model."""
    for module in model.modules():
        if isinstance(module, MoETransformer):
            return [], moe_layer_indices(module)
    named = {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}
    numbers = [re.search(r"blocks\.(\d+)\.", name) for name in named]
    return list(named.values()), [int(match[1]) if match else i for i, match in enumerate(numbers)]
