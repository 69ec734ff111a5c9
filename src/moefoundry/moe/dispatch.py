"""Bring each token to the ranks of its experts, and the results back.

A dispatcher is the only part of the layer that knows where experts live. All of them share one interface; what
``combine`` needs of ``dispatch`` is kept in a frozen :class:`DispatchMetadata`, not in the dispatcher.

Between ranks a token travels once for each rank that has an expert of it, not once for each expert (as in DeepEP,
https://github.com/deepseek-ai/DeepEP): the experts' rank makes the copies, and adds up its results before they go back.
Weights travel with the tokens, and the experts apply them: no result has to be kept for their gradient.

Dispatch spreads tokens over ranks, combine collects and sums their results; each is the other's transpose, and so its
backward pass. Two of these four legs, the spreading ones, can carry tokens in another form, a :class:`RowCodec`'s.

P tokens at a rank that has experts for them, G ranks of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.all_to_all import Splits, all_to_all_rows, start_all_to_all, wait_for
from moefoundry.ops.permute import RowOrder, count_by_expert, gather_rows, order_by_expert, permute_slots, sum_of_rows


@dataclass(frozen=True)
class Hop:
    """How tokens went to other ranks of a group.

    Attributes:
        order: Of (token, rank) pairs, by rank.
        splits: How many went to each, and came from it.
    """

    order: RowOrder
    splits: Splits


@dataclass(frozen=True)
class DispatchMetadata:
    """What is known of the P tokens that arrived, and what ``combine`` needs to undo ``dispatch``.

    Attributes:
        weights_PK: What each slot counts in the sum over its token's experts; differentiable.
        order: Of the slots that are for this rank's experts: its R rows.
        hops: How the tokens came; none where all experts are here.
    """

    weights_PK: Tensor
    order: RowOrder
    hops: tuple[Hop, ...] = ()

    @property
    def tokens_per_local_expert(self) -> Tensor:
        """int64 [num_local_experts]; how the R rows split."""
        return self.order.tokens_per_expert_E

    @property
    def row_weights_R(self) -> Tensor:
        """[R]; the weights in the order of rows, differentiable."""
        return permute_slots(self.weights_PK, self.order)


class PendingExchange(NamedTuple):
    """Tokens under way.

    Attributes:
        wait: Wait for them: [P, D] and the metadata. Call it once; what is computed before overlaps with the exchange.
    """

    wait: Callable[[], tuple[Tensor, DispatchMetadata]]


class TokenDispatcher(Protocol):
    """What the layer asks of a dispatcher."""

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> PendingExchange:
        """Send each token toward the ranks of its experts.

        Args:
            tokens_TD: This rank's tokens, [T, D].
            topk_expert_ids_TK: int64 [T, K], distinct within a token.
            topk_weights_TK: [T, K], differentiable; they travel too.
            kept_TK: bool [T, K]; slots that are sent. None sends all.
        """
        ...

    def combine(self, mixed_PD: Tensor, metadata: DispatchMetadata) -> Tensor:
        """[P, D] -> [T, D]: add up what each token's ranks made of it."""
        ...


class LocalDispatcher:
    """All experts are on this rank: tokens stay where they are."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> PendingExchange:
        order = order_by_expert(topk_expert_ids_TK, self.num_experts, kept_TK)
        return PendingExchange(lambda: (tokens_TD, DispatchMetadata(topk_weights_TK, order)))

    def combine(self, mixed_PD: Tensor, metadata: DispatchMetadata) -> Tensor:
        return mixed_PD


class RowCodec(Protocol):
    """Another form of rows, for links."""

    def encode(self, rows_TD: Tensor) -> Tensor:
        """[T, D] -> [T, ...], row by row."""
        ...

    def decode(self, sent_R: Tensor, like: Tensor) -> Tensor:
        """[R, ...] -> [R, D], width and dtype as ``like`` has them."""
        ...


class AllToAllDispatcher:
    """Experts are divided among the ranks of a group: rank r owns experts ``r * E / size .. (r + 1) * E / size``.

    The ranks tell each other how many tokens come (one exchange of counts, and the one time that a layer waits for the
    host), then exchange the tokens, sorted by rank, and beside them what each is for. Combine is the same, backwards. A
    rank may receive nothing, or all.

    Args:
        num_experts: E, a multiple of the group's size.
        group: The ranks of the mesh axis ``expert``.

    Attributes:
        codec: What tokens, and gradients of results, travel as; a precision policy may set one.

    Raises:
        ValueError: The group's size does not divide E.
    """

    codec: RowCodec | None = None

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        if num_experts % group.size():
            raise ValueError(f"{num_experts} experts do not divide among {group.size()} ranks")
        self.num_experts = num_experts
        self.group = group

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> PendingExchange:
        expert_ids_TK = topk_expert_ids_TK if kept_TK is None else topk_expert_ids_TK.where(kept_TK, -1)
        splits, num_rows = self._plan(expert_ids_TK)
        first = next_hop(expert_ids_TK, self.num_experts, splits[0])
        slots = start_hop(pack_slots(topk_weights_TK, expert_ids_TK), first)
        tokens = start_hop(tokens_TD, first, self.codec)

        def wait() -> tuple[Tensor, DispatchMetadata]:
            hops, num_experts = [first], self.num_experts // first.splits.group.size()
            weights_PK, ids_PK = unpack_slots(finish_hops(slots, hops), first, num_experts)
            for split in splits[1:]:
                hop, num_experts = next_hop(ids_PK, num_experts, split), num_experts // split.group.size()
                packed = finish_hops(start_hop(pack_slots(weights_PK, ids_PK), hop), [hop])
                weights_PK, ids_PK = unpack_slots(packed, hop, num_experts)
                hops.append(hop)
            order = order_by_expert(ids_PK, num_experts, ids_PK >= 0, num_rows)
            return finish_hops(tokens, hops), DispatchMetadata(weights_PK, order, tuple(hops))

        return PendingExchange(wait)

    def combine(self, mixed_PD: Tensor, metadata: DispatchMetadata) -> Tensor:
        return _Combine.apply(mixed_PD, metadata.hops, self.codec)

    def _plan(self, expert_ids_TK: Tensor) -> tuple[list[Splits], int]:
        """How tokens split in each hop, and how many rows this rank's experts get."""
        counts_G2 = torch.stack(pairs_and_slots(expert_ids_TK, self.num_experts, self.group.size()), dim=1)
        one_each = [1] * self.group.size()
        received_G2 = all_to_all_rows(counts_G2, Splits(one_each, one_each, self.group))
        send, receive, rows = torch.stack([counts_G2[:, 0], *received_G2.unbind(1)]).tolist()
        return [Splits(send, receive, self.group)], sum(rows)


def next_hop(expert_ids_TK: Tensor, num_experts: int, splits: Splits) -> Hop:
    """Order tokens by the ranks that have an expert of them.

    Args:
        expert_ids_TK: int64 [T, K], among the experts that the group has; -1 for a slot that has none there.
        num_experts: That the group has together, each rank as many as the others.
        splits: As the group agreed on them.
    """
    ranks = splits.group.size()
    visits_TG = visits(expert_ids_TK // (num_experts // ranks), ranks)
    ranks_TG = torch.arange(ranks, device=visits_TG.device).expand_as(visits_TG)
    return Hop(order_by_expert(ranks_TG, ranks, visits_TG, sum(splits.send)), splits)


def pack_slots(weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """[T, 2 K] in fp32 at least, which holds an expert's number exactly: one exchange for both."""
    dtype = torch.promote_types(weights_TK.dtype, torch.float32)
    return torch.cat([weights_TK.to(dtype), expert_ids_TK.to(dtype)], dim=1)


def unpack_slots(slots_P2K: Tensor, hop: Hop, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights [P, K], and experts int64 [P, K] counted from this rank's first of ``num_experts``; -1 for others."""
    weights_PK, ids_PK = slots_P2K.chunk(2, dim=1)
    ids_PK = ids_PK.long() - hop.splits.group.rank() * num_experts
    return weights_PK, ids_PK.where((ids_PK >= 0) & (ids_PK < num_experts), -1)


def visits(places_TK: Tensor, num_places: int) -> Tensor:
    """bool [T, num_places]: where each token has a slot; -1 is nowhere."""
    visited = torch.zeros(len(places_TK), num_places + 1, dtype=torch.bool, device=places_TK.device)
    return visited.scatter_(1, places_TK.remainder(num_places + 1), True)[:, :-1]  # -1 becomes the last


def pairs_and_slots(expert_ids_TK: Tensor, num_experts: int, num_places: int) -> tuple[Tensor, Tensor]:
    """Tokens that have an expert at each place, and how many slots they have there; both int64 [num_places]."""
    places_TK = expert_ids_TK // (num_experts // num_places)
    return visits(places_TK, num_places).sum(dim=0), count_by_expert(places_TK, num_places, places_TK >= 0)


class StartedHop(NamedTuple):
    """Rows on their first hop.

    Attributes:
        under_way: What was sent; only :func:`~moefoundry.ops.all_to_all.wait_for` may read it.
        sent: Has the shape of what was sent, no memory, and the gradient that comes back.
        codec: What rows travel as.
    """

    under_way: Tensor
    sent: Tensor
    codec: RowCodec | None


def start_hop(rows_T: Tensor, hop: Hop, codec: RowCodec | None = None) -> StartedHop:
    """Send rows [T, ...] on a hop, and do not wait. :func:`finish_hops` waits.

    The backward pass of the latter starts the exchange of gradients, the backward pass of this one waits for it: what
    lies between overlaps with it too.
    """
    under_way, sent = _StartHop.apply(rows_T, hop, codec)
    return StartedHop(under_way, sent, codec)


def finish_hops(started: StartedHop, hops: list[Hop]) -> Tensor:
    """[P, ...]: wait for the first of the hops, and go on with the others."""
    return _FinishHops.apply(started.sent, started.under_way, tuple(hops), started.codec)


def spread(rows_T: Tensor, hops: tuple[Hop, ...]) -> Tensor:
    """[T, ...] -> [P, ...]: rows go to other ranks as tokens went."""
    for hop in hops:
        rows_T = all_to_all_rows(gather_rows(rows_T, hop.order), hop.splits)
    return rows_T


def collect(rows_P: Tensor, hops: tuple[Hop, ...]) -> Tensor:
    """[P, ...] -> [T, ...]: rows go back to their token, and add up; the transpose of :func:`spread`."""
    for hop in reversed(hops):
        rows_P = sum_of_rows(all_to_all_rows(rows_P, hop.splits.reverse()), hop.order)
    return rows_P


class _StartHop(Function):
    @staticmethod
    def forward(ctx: Any, rows_T: Tensor, hop: Hop, codec: RowCodec | None) -> tuple[Tensor, Tensor]:
        ctx.hop = hop
        sent = rows_T if codec is None else codec.encode(rows_T)
        under_way = start_all_to_all(gather_rows(sent, hop.order), hop.splits)
        ctx.mark_non_differentiable(under_way)
        return under_way, rows_T.new_empty(1).expand(sum(hop.splits.send), *rows_T.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad_under_way: Tensor) -> tuple[Tensor, None, None]:
        return sum_of_rows(wait_for(grad_under_way), ctx.hop.order), None, None


class _FinishHops(Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, under_way: Tensor, hops: tuple[Hop, ...], codec: RowCodec | None) -> Tensor:
        ctx.hops = hops
        rows = spread(wait_for(under_way), hops[1:])
        return rows.view_as(rows) if codec is None else codec.decode(rows, sent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None, None]:
        first, *others = ctx.hops
        return start_all_to_all(collect(grad_P, tuple(others)), first.splits.reverse()), None, None, None


class _Combine(Function):
    """:func:`collect`; backward, gradients spread as the codec's rows."""

    @staticmethod
    def forward(ctx: Any, mixed_PD: Tensor, hops: tuple[Hop, ...], codec: RowCodec | None) -> Tensor:
        ctx.hops, ctx.codec = hops, codec
        return collect(mixed_PD, hops)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        if ctx.codec is None:
            return spread(grad_TD, ctx.hops), None, None
        return ctx.codec.decode(spread(ctx.codec.encode(grad_TD), ctx.hops), grad_TD), None, None
