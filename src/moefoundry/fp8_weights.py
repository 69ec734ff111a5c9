"""FP8 weights quantized once a step: docs/fp8.md.

On one device, and in units of FSDP that only one rank shares, modules keep blocks of whole weights. Of what FSDP
gathers from several ranks each keeps the blocks of its shard, where those are whole (``fp8_gather.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from moefoundry.fp8_gather import ShardedWeight
from moefoundry.moe.experts import FeedForward
from moefoundry.ops.fp8 import KeptBlocks
from moefoundry.parameter_states import ParameterStates, State
from moefoundry.precision import Fp8Module


class Fp8Weights:
    """Lets modules keep their quantized weights, and forgets them before a forward pass if parameters have changed.

    Args:
        model: The model, whose ``forward`` is the only way into its modules.
        modules: Modules of it that keep their weights; others than :class:`~moefoundry.precision.Fp8Module` are left
            out.
        sharded: Weights that FSDP gathers in FP8.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module], sharded: Iterable[ShardedWeight] = ()) -> None:
        self._states = ParameterStates()
        self._sharded: list[tuple[ShardedWeight, list[State]]] = [(weight, []) for weight in sharded]
        self._kept: list[tuple[Fp8Module, KeptBlocks]] = []
        self._seen: list[list[State]] = []
        for module in modules:
            if isinstance(module, Fp8Module):
                blocks = KeptBlocks()
                module.keep_blocks(blocks)
                self._kept.append((module, blocks))
                self._seen.append([])
        if self._kept or self._sharded:
            model.register_forward_pre_hook(self.refresh, prepend=True)  # before FSDP gathers anything

    def refresh(self, *_: Any) -> None:
        """Forget the blocks of every module one of whose parameters has changed since the last time, or is new."""
        for index, (module, blocks) in enumerate(self._kept):
            states = [self._states.of(parameter) for parameter in _weights(module)]
            if states != self._seen[index]:
                blocks.forget()
                self._seen[index] = states
        for weight, seen in self._sharded:
            weight.attach()
            state = [self._states.of(weight.parameter)]
            if state != seen:
                weight.shard.forget()
                seen[:] = state


def _weights(module: nn.Module) -> Iterable[nn.Parameter]:
    """Give the parameters that a module quantizes: its own, or those of the layers of a feed-forward network."""
    owners = module.children() if isinstance(module, FeedForward) else [module]
    return (value for owner in owners for value in owner._parameters.values() if value is not None)
