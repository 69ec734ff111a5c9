"""What one rank does for all: the store is asked once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from moefoundry.config import UserError


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """The result of ``action`` on rank 0, given to every rank; a ``UserError`` there is raised on every rank."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_every_rank(value: Any) -> list[Any]:
    """Every rank's ``value``, by rank; small objects only. A collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank() -> int:
    """This rank; 0 in a plain process."""
    return dist.get_rank() if dist.is_initialized() else 0
