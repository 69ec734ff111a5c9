"""Exchanges of token rows among ranks: autograd functions that start an exchange in one place and wait in another.

A hop copies tokens to the ranks that need them, or, on the way back, sums the rows that those return; each is the
other's transpose, and so its backward pass:

    depart      copy, and start        backward: wait, and sum
    pass_on     wait, copy, start      backward: wait, sum, start
    arrive      wait                   backward: start
    send_back   start                  backward: wait
    pass_back   wait, sum, start       backward: wait, copy, start
    collect     wait, and sum          backward: copy, and start

Autograd runs functions in the reverse order of their calls, so what is computed between a start and its wait overlaps
with the exchange in both passes. Rows under way are in a :class:`Flight`, beside autograd: what passes from function to
function is a *link*, [0, ...], without rows, that has their width and dtype.

The legs that copy (depart, and the backward pass of collect) can send rows in another form: :class:`RowCodec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.all_to_all import Splits, start_all_to_all, wait_for
from moefoundry.ops.permute import RowOrder, gather_rows, sum_of_rows


@dataclass(frozen=True)
class Hop:
    """One exchange of tokens among the ranks of a group.

    Attributes:
        order: Order of the (token, rank) pairs, by rank.
        splits: Number of tokens sent to each rank, and received from it.
    """

    order: RowOrder
    splits: Splits


class RowCodec(Protocol):
    """Another form of rows for the exchange, such as FP8 with scales."""

    def encode(self, rows_TD: Tensor) -> Tensor:
        """Encode [T, D] -> [T, ...], row by row."""
        ...

    def decode(self, sent_R: Tensor, like: Tensor) -> Tensor:
        """Decode [R, ...] -> [R, D], with the width and dtype of ``like``."""
        ...


class Flight:
    """Rows under way; at most one exchange at a time."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def start(self, rows: Tensor, splits: Splits) -> None:
        """Start an exchange."""
        self._rows = start_all_to_all(rows, splits)

    def land(self) -> Tensor:
        """Wait for the rows of the exchange that was started."""
        rows, self._rows = self._rows, None
        assert rows is not None, "an exchange is waited for once, after it was started"
        return wait_for(rows)


def depart(
    rows_T: Tensor, hops: Sequence[Hop], flights: Sequence[Flight], codec: RowCodec | None = None
) -> tuple[Tensor, ...]:
    """Copy rows [T, ...] to the ranks of the first hop, and start to send them.

    Args:
        rows_T: Rows of all tokens.
        hops: The hop of each chunk of tokens, in the order of the tokens.
        flights: The flight of each chunk.
        codec: Form in which the rows are sent; None sends them as they are.

    Returns:
        The link of each chunk.
    """
    return _Depart.apply(rows_T, tuple(hops), tuple(flights), codec)


def pass_on(link: Tensor, arriving: Hop, onward: Hop, flight: Flight) -> Tensor:
    """Wait for the rows of one hop, and start to send copies to the ranks of the next, as they came."""
    return _PassOn.apply(link, arriving, onward, flight)


def arrive(link: Tensor, hop: Hop, flight: Flight, codec: RowCodec | None = None) -> Tensor:
    """Wait for the rows of the last hop, [P, ...]."""
    return _Arrive.apply(link, hop, flight, codec)


def send_back(rows_P: Tensor, hop: Hop, flight: Flight, codec: RowCodec | None = None) -> Tensor:
    """Start to send rows [P, ...] back over the last hop; ``codec`` is for their gradients."""
    return _SendBack.apply(rows_P, hop, flight, codec)


def pass_back(link: Tensor, arriving: Hop, onward: Hop, flight: Flight) -> Tensor:
    """Wait for the rows that return over ``onward``, sum those of each token, and start to send the sums back."""
    return _PassBack.apply(link, arriving, onward, flight)


def collect(
    links: Sequence[Tensor], hops: Sequence[Hop], flights: Sequence[Flight], codec: RowCodec | None = None
) -> Tensor:
    """Wait for the rows that return over the first hop, and sum those of each token, [T, ...]; see :func:`depart`."""
    return _Collect.apply(tuple(hops), tuple(flights), codec, *links)


def _copy(rows: Tensor, hop: Hop, flight: Flight) -> None:
    flight.start(gather_rows(rows, hop.order), hop.splits)


def _sum(hop: Hop, flight: Flight) -> Tensor:
    return sum_of_rows(flight.land(), hop.order)


def _copy_all(
    rows_T: Tensor, hops: Sequence[Hop], flights: Sequence[Flight], codec: RowCodec | None, last_first: bool = False
) -> None:
    """Start the exchange of each chunk; those that are needed first go first."""
    sent_T = rows_T if codec is None else codec.encode(rows_T)
    chunks = list(zip(sent_T.split([len(hop.order.first_of_token) - 1 for hop in hops]), hops, flights, strict=True))
    for rows, hop, flight in reversed(chunks) if last_first else chunks:
        _copy(rows, hop, flight)


def _sum_all(hops: Sequence[Hop], flights: Sequence[Flight]) -> Tensor:
    sums = [_sum(hop, flight) for hop, flight in zip(hops, flights, strict=True)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _link(rows: Tensor) -> Tensor:
    return rows.new_empty(0, *rows.shape[1:])


class _Depart(Function):
    @staticmethod
    def forward(
        ctx: Any, rows_T: Tensor, hops: tuple[Hop, ...], flights: tuple[Flight, ...], codec: RowCodec | None
    ) -> tuple[Tensor, ...]:
        ctx.hops, ctx.flights = hops, flights
        _copy_all(rows_T, hops, flights, codec)
        return tuple(_link(rows_T) for _ in hops)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *links: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_all(ctx.hops, ctx.flights), None, None, None


class _PassOn(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, arriving: Hop, onward: Hop, flight: Flight) -> Tensor:
        ctx.arriving, ctx.onward, ctx.flight = arriving, onward, flight
        _copy(flight.land(), onward, flight)
        return _link(link)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.flight.start(_sum(ctx.onward, ctx.flight), ctx.arriving.splits.reverse())
        return link, None, None, None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, hop: Hop, flight: Flight, codec: RowCodec | None) -> Tensor:
        ctx.hop, ctx.flight = hop, flight
        rows = flight.land()
        return rows.view_as(rows) if codec is None else codec.decode(rows, link)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.flight.start(grad_P, ctx.hop.splits.reverse())
        return _link(grad_P), None, None, None


class _SendBack(Function):
    @staticmethod
    def forward(ctx: Any, rows_P: Tensor, hop: Hop, flight: Flight, codec: RowCodec | None) -> Tensor:
        ctx.flight, ctx.codec = flight, codec
        flight.start(rows_P, hop.splits.reverse())
        return _link(rows_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, None, None, None]:
        rows = ctx.flight.land()
        return rows if ctx.codec is None else ctx.codec.decode(rows, link), None, None, None


class _PassBack(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, arriving: Hop, onward: Hop, flight: Flight) -> Tensor:
        ctx.onward, ctx.flight = onward, flight
        flight.start(_sum(onward, flight), arriving.splits.reverse())
        return _link(link)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, None, None, None]:
        _copy(ctx.flight.land(), ctx.onward, ctx.flight)
        return link, None, None, None


class _Collect(Function):
    @staticmethod
    def forward(
        ctx: Any, hops: tuple[Hop, ...], flights: tuple[Flight, ...], codec: RowCodec | None, *links: Tensor
    ) -> Tensor:
        ctx.hops, ctx.flights, ctx.codec = hops, flights, codec
        if len(hops) > 1:
            # Checkpointing ends a recomputation at the last tensor that is saved: with this one, after the last wait.
            # The last tensor of a single chunk is saved before its results are sent, when nothing is under way.
            ctx.save_for_backward(links[0])
        return _sum_all(hops, flights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        _copy_all(grad_T, ctx.hops, ctx.flights, ctx.codec, last_first=True)
        return None, None, None, *(_link(grad_T) for _ in ctx.hops)
