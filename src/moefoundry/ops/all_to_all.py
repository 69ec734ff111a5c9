"""All-to-all of rows with uneven splits.

The collectives are the functional ones, whose results selective activation checkpointing can keep. An exchange is
started, and waited for later: what is computed in between overlaps with it. Neither is differentiable; their users
spell out backward passes, which are the same exchanges the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_functional = torch.ops._c10d_functional
EXCHANGE_OPS = frozenset({_functional.all_to_all_single.default, _functional.all_gather_into_tensor.default})
"""The collectives of this file, as a dispatch mode sees them."""


@dataclass(frozen=True)
class Splits:
    """Who sends how many rows to whom.

    Attributes:
        send: Rows for each rank of the group; 0 is fine.
        receive: Rows from each rank: what that rank's ``send`` says of this one.
        group: All of its ranks take part, also those that have nothing to send or to receive.
    """

    send: Sequence[int]
    receive: Sequence[int]
    group: dist.ProcessGroup

    def reverse(self) -> Splits:
        """The way back."""
        return Splits(self.receive, self.send, self.group)


def all_to_all_rows(rows: Tensor, splits: Splits) -> Tensor:
    """Send the first ``splits.send[0]`` rows to rank 0 of the group, the next to rank 1, ...

    Args:
        rows: [sum(splits.send), ...]; any dtype that the backend moves.
        splits: How the rows split.

    Returns:
        [sum(splits.receive), ...], rows of rank 0 first.
    """
    return wait_for(start_all_to_all(rows, splits))


def start_all_to_all(rows: Tensor, splits: Splits) -> Tensor:
    """:func:`all_to_all_rows` that does not wait; only :func:`wait_for` may read the result."""
    group = splits.group.group_name
    return _functional.all_to_all_single(rows.contiguous(), list(splits.receive), list(splits.send), group)


def wait_for(under_way: Tensor) -> Tensor:
    """Wait for the rows of an exchange."""
    return _functional.wait_tensor(under_way)


def all_gather_rows(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] of each of G ranks -> [G, ...] on all."""
    gathered = _functional.all_gather_into_tensor(row.unsqueeze(0), group.size(), group.group_name)
    return wait_for(gathered)
