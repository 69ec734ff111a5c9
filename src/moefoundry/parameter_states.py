"""Tell if parameters still have the values that they had."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

State = tuple[int, int, int, int, int]


class ParameterStates:
    """Gives parameters states that differ whenever their values may.

    Autograd counts changes of tensors, but not those that fused optimizers make: so all steps are counted, of every
    optimizer.
    """

    def __init__(self) -> None:
        self._steps = 0
        reference = weakref.ref(self)

        def note_step(*_: Any) -> None:
            if (states := reference()) is not None:
                states._steps += 1

        weakref.finalize(self, register_optimizer_step_post_hook(note_step).remove)

    @torch.no_grad()
    def of(self, parameter: nn.Parameter) -> State:
        """Give the state of a parameter, or of this rank's shard; only for comparison with an earlier one."""
        values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        steps = self._steps if parameter.requires_grad else 0
        # a DTensor counts its own changes, and its local tensor those that are made to that one
        return id(parameter), values.data_ptr(), parameter._version, values._version, steps
