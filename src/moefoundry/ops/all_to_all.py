"""All-to-all of rows with uneven splits, and its gradient: the same exchange the other way.

The exchange can be started, and finished later: what is computed in between overlaps with it, forward and backward (the
backward pass of ``finish`` starts the exchange of gradients, that of ``start`` waits for it). The collectives are the
functional ones, whose results selective activation checkpointing can keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_functional = torch.ops._c10d_functional
EXCHANGE_OPS = frozenset({_functional.all_to_all_single.default, _functional.all_gather_into_tensor.default})
"""The collectives of this file, for those who look at operations as they pass."""


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


@dataclass
class _Return:
    """Carries the exchange of gradients from the backward pass of ``finish``, which starts it, to that of ``start``.

    It cannot travel as a gradient: while it is under way it has as many rows as were sent, not as were received.
    """

    grad: Tensor | None = None


@dataclass(frozen=True)
class Flight:
    """Rows under way; only :func:`finish_all_to_all` may look at them."""

    rows: Tensor
    splits: Splits
    way_back: _Return


def all_to_all_rows(rows: Tensor, splits: Splits) -> Tensor:
    """Send the first ``splits.send[0]`` rows to rank 0 of the group, the next to rank 1, ...

    Args:
        rows: [sum(splits.send), ...]; any dtype that the backend moves.
        splits: How the rows split.

    Returns:
        [sum(splits.receive), ...], rows of rank 0 first.
    """
    return finish_all_to_all(start_all_to_all(rows, splits))


def start_all_to_all(rows: Tensor, splits: Splits) -> Flight:
    """:func:`all_to_all_rows` that does not wait."""
    way_back = _Return()
    return Flight(_Start.apply(rows, splits, way_back), splits, way_back)


def finish_all_to_all(flight: Flight) -> Tensor:
    """Wait for the rows; once for each flight."""
    return _Finish.apply(flight.rows, flight.splits, flight.way_back)


def all_gather_rows(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] of each of G ranks -> [G, ...] on all; not differentiable."""
    gathered = _functional.all_gather_into_tensor(row.unsqueeze(0), group.size(), group.group_name)
    return _functional.wait_tensor(gathered)


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits, way_back: _Return) -> Tensor:
        ctx.way_back = way_back
        return _exchange(rows, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        grad, ctx.way_back.grad = ctx.way_back.grad, None
        return _functional.wait_tensor(grad), None, None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits, way_back: _Return) -> Tensor:
        ctx.splits, ctx.way_back = splits, way_back
        return _functional.wait_tensor(rows).view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.way_back.grad = _exchange(grad, ctx.splits.reverse())
        return grad, None, None  # stands for the one that travels; nobody reads it


def _exchange(rows: Tensor, splits: Splits) -> Tensor:
    group = splits.group.group_name
    return _functional.all_to_all_single(rows.contiguous(), list(splits.receive), list(splits.send), group)
