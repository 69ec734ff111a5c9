"""All-to-all of rows with uneven splits.

The collectives are the functional ones, whose results selective activation checkpointing can keep. An exchange is
started, and waited for later: computation in between overlaps with it. Nothing here is differentiable; the callers
write their backward passes, which are the same exchanges in the other direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_functional = torch.ops._c10d_functional
EXCHANGE_OPS = frozenset({_functional.all_to_all_single.default, _functional.all_gather_into_tensor.default})
"""The collectives of this file as operators, for activation checkpointing."""

_under_way: dict[int, Tensor] = {}
"""Rows of exchanges that nobody has waited for, by ``id``."""


@dataclass(frozen=True)
class Splits:
    """Numbers of rows that ranks send to each other.

    Attributes:
        send: Rows for each rank of the group, from 0.
        receive: Rows from each rank: the numbers that those ranks have for this rank in ``send``.
        group: The ranks. All take part, with or without rows.
    """

    send: Sequence[int]
    receive: Sequence[int]
    group: dist.ProcessGroup

    def reverse(self) -> Splits:
        """Swap both, for the way back."""
        return Splits(self.receive, self.send, self.group)


def all_to_all_rows(rows: Tensor, splits: Splits) -> Tensor:
    """Send the first ``splits.send[0]`` rows to rank 0 of the group, the next to rank 1, ...

    Args:
        rows: [sum(splits.send), ...], any dtype that the backend sends.
        splits: Numbers of rows.

    Returns:
        [sum(splits.receive), ...], rows of rank 0 first.
    """
    return wait_for(start_all_to_all(rows, splits))


def start_all_to_all(rows: Tensor, splits: Splits) -> Tensor:
    """Start :func:`all_to_all_rows` without waiting; only :func:`wait_for` may read the result."""
    group = splits.group.group_name
    pending = _functional.all_to_all_single(rows.contiguous(), list(splits.receive), list(splits.send), group)
    _under_way[id(pending)] = pending
    return pending


def wait_for(pending: Tensor) -> Tensor:
    """Wait for the rows of an exchange that was started."""
    _under_way.pop(id(pending), None)
    return _functional.wait_tensor(pending)


def wait_for_all() -> None:
    """Wait for the exchanges of a step that was left: torch keeps their rows until then."""
    for pending in list(_under_way.values()):
        wait_for(pending)


def all_gather_rows(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [...] of each of G ranks on all of them, [G, ...]."""
    gathered = _functional.all_gather_into_tensor(row.unsqueeze(0), group.size(), group.group_name)
    return wait_for(gathered)
