"""A second optimizer that takes up the state of the first, and goes on beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

from torch import nn
from torch.optim import Optimizer


def go_on_together(
    steps: Iterable[int],
    ours: Optimizer,
    mine: Mapping[str, nn.Parameter],
    restored: Optimizer,
    copy: Mapping[str, nn.Parameter],
) -> None:
    """Load the state of ``ours`` and the values of ``mine``, then take each step with the same gradients and rates."""
    restored.load_state_dict(deepcopy(ours.state_dict()))
    for name, parameter in mine.items():
        copy[name].data.copy_(parameter.detach())
    for _ in steps:
        for name, parameter in mine.items():
            copy[name].grad = parameter.grad
        for group, trained in zip(restored.param_groups, ours.param_groups, strict=True):
            group["lr"] = trained["lr"]
        restored.step()
