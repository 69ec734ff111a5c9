"""Bring each token's rows to its experts and the results back.

A dispatcher is the only part of the layer that knows where experts live. All of them share one interface; what
``combine`` needs of ``dispatch`` travels in a frozen :class:`DispatchMetadata`, not in the dispatcher.

Between ranks a token travels once for each rank that has an expert of it, not once for each expert (as in DeepEP,
https://github.com/deepseek-ai/DeepEP): the experts' rank makes the copies, and adds up its results before they go back.
So a row crosses at most once each way, and the copies and the sum take the place of a reorder by expert. Weights travel
with the tokens, and the experts apply them: no result has to be kept for their gradient.

Dispatch spreads rows, combine collects and sums them; each is the other's transpose, and so its backward pass. Two of
these four legs, the spreading ones, can carry rows in another form than that of tokens, a :class:`RowCodec`'s.

P pairs (token, rank) on their way, G ranks of a group.
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

from moefoundry.ops.all_to_all import Splits, all_to_all_rows, finish_all_to_all, start_all_to_all
from moefoundry.ops.permute import RowOrder, count_by_expert, order_by_expert, permute, permute_slots, sum_rows


@dataclass(frozen=True)
class Hop:
    """How tokens went to other ranks of a group.

    Attributes:
        order: Of their pairs, by rank.
        splits: How many went to each, and came from it.
    """

    order: RowOrder
    splits: Splits


@dataclass(frozen=True)
class DispatchMetadata:
    """What is known of the R rows of this rank's experts, and what ``combine`` needs to undo ``dispatch``.

    Attributes:
        row_weights_R: What each row counts in the sum over its token's experts; differentiable.
        order: Of the slots, of tokens that came, for this rank's experts.
        hops: How the tokens came; none where all experts are here.
    """

    row_weights_R: Tensor
    order: RowOrder
    hops: tuple[Hop, ...] = ()

    @property
    def tokens_per_local_expert(self) -> Tensor:
        """int64 [num_local_experts]; how the R rows split."""
        return self.order.tokens_per_expert_E


Arrival = Callable[[], tuple[Tensor, DispatchMetadata]]
"""Rows under way. Called, it waits for them: [R, D] in the order of this rank's experts, and the metadata."""


class TokenDispatcher(Protocol):
    """What the layer asks of a dispatcher."""

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Arrival:
        """Send a copy of each token toward each of its experts; work done before the arrival is asked for overlaps.

        Args:
            tokens_TD: This rank's tokens, [T, D].
            topk_expert_ids_TK: int64 [T, K], distinct within a token.
            topk_weights_TK: [T, K], differentiable; they travel too.
            kept_TK: bool [T, K]; slots that are sent. None sends all.
        """
        ...

    def combine(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        """[R, D] -> [T, D], the sum over each token's (kept) experts of rows that have been weighted."""
        ...


class LocalDispatcher:
    """All experts are on this rank: dispatch is a permutation."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Arrival:
        order = order_by_expert(topk_expert_ids_TK, self.num_experts, kept_TK)
        metadata = DispatchMetadata(permute_slots(topk_weights_TK, order), order)
        return lambda: (permute(tokens_TD, order), metadata)

    def combine(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        return sum_rows(rows_RD, metadata.order)


class RowCodec(Protocol):
    """Another form of rows, for links."""

    def encode(self, rows_TD: Tensor) -> Tensor:
        """[T, D] -> [T, ...], row by row."""
        ...

    def decode(self, sent_R: Tensor, like: Tensor) -> Tensor:
        """[R, ...] -> [R, D], width and dtype as ``like`` has them."""
        ...


class Tokens(NamedTuple):
    """Tokens and what they are for.

    Attributes:
        rows_TD: [T, D], or what a codec made of it.
        expert_ids_TK: int64 [T, K], among the experts that can be reached from here; -1 for a slot that has none.
        weights_TK: [T, K], differentiable.
    """

    rows_TD: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor


class AllToAllDispatcher:
    """Experts are divided among the ranks of a group: rank r owns experts ``r * E / size .. (r + 1) * E / size``.

    The ranks tell each other how many tokens come (one exchange of counts, and the one time that a layer waits for the
    host), then exchange the tokens, sorted by rank, and beside them what each is for. What came is copied into the
    order of this rank's experts. Combine is the same, backwards. A rank may receive nothing, or all.

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
    ) -> Arrival:
        expert_ids_TK = topk_expert_ids_TK if kept_TK is None else topk_expert_ids_TK.where(kept_TK, -1)
        (first, *others), num_rows = self._plan(expert_ids_TK)
        rows_TD = tokens_TD if self.codec is None else self.codec.encode(tokens_TD)
        hop, land = depart(Tokens(rows_TD, expert_ids_TK, topk_weights_TK), self.num_experts, first)
        departure = None if self.codec is None else Departure(tokens_TD)

        def arrive() -> tuple[Tensor, DispatchMetadata]:
            hops, tokens, num_experts = [hop], land(), self.num_experts // first.group.size()
            for splits in others:
                next_hop, land_there = depart(tokens, num_experts, splits)
                hops, tokens, num_experts = [*hops, next_hop], land_there(), num_experts // splits.group.size()
            order = order_by_expert(tokens.expert_ids_TK, num_experts, tokens.expert_ids_TK >= 0, num_rows)
            metadata = DispatchMetadata(permute_slots(tokens.weights_TK, order), order, tuple(hops))
            rows_R = permute(tokens.rows_TD, order)
            if self.codec is None or departure is None:
                return rows_R, metadata
            return departure.arrive(self.codec.decode(rows_R, tokens_TD), metadata), metadata

        return arrive

    def combine(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        if self.codec is None:
            return collect(rows_RD, metadata)
        return _Combine.apply(rows_RD, metadata, self.codec)

    def _plan(self, expert_ids_TK: Tensor) -> tuple[list[Splits], int]:
        """How tokens split in each hop, and how many rows this rank's experts get."""
        counts_G2 = torch.stack(pairs_and_slots(expert_ids_TK, self.num_experts, self.group.size()), dim=1)
        one_each = [1] * self.group.size()
        received_G2 = all_to_all_rows(counts_G2, Splits(one_each, one_each, self.group))
        send, receive, rows = torch.stack([counts_G2[:, 0], *received_G2.unbind(1)]).tolist()
        return [Splits(send, receive, self.group)], sum(rows)


def depart(tokens: Tokens, num_experts: int, splits: Splits) -> tuple[Hop, Callable[[], Tokens]]:
    """Send each token to the ranks that have an expert of it; the function waits for those that come.

    Args:
        tokens: Of this rank.
        num_experts: That the group has together, each rank as many as the others.
        splits: As the group agreed on them.
    """
    ranks, local = splits.group.size(), num_experts // splits.group.size()
    visits_TG = visits(tokens.expert_ids_TK // local, ranks)
    ranks_TG = torch.arange(ranks, device=visits_TG.device).expand_as(visits_TG)
    order = order_by_expert(ranks_TG, ranks, visits_TG, sum(splits.send))
    # one exchange for both: fp32 holds an expert's number exactly
    dtype = torch.promote_types(tokens.weights_TK.dtype, torch.float32)
    slots_T2K = torch.cat([tokens.weights_TK.to(dtype), tokens.expert_ids_TK.to(dtype)], dim=1)
    slots_under_way = start_all_to_all(permute(slots_T2K, order), splits)
    rows_under_way = start_all_to_all(permute(tokens.rows_TD, order), splits)

    def land() -> Tokens:
        weights_PK, ids_PK = finish_all_to_all(slots_under_way).chunk(2, dim=1)
        ids_PK = ids_PK.long() - splits.group.rank() * local
        ids_PK = ids_PK.where((ids_PK >= 0) & (ids_PK < local), -1)
        return Tokens(finish_all_to_all(rows_under_way), ids_PK, weights_PK)

    return Hop(order, splits), land


def visits(places_TK: Tensor, num_places: int) -> Tensor:
    """bool [T, num_places]: where each token has a slot; -1 is nowhere."""
    visited = torch.zeros(len(places_TK), num_places + 1, dtype=torch.bool, device=places_TK.device)
    return visited.scatter_(1, places_TK.remainder(num_places + 1), True)[:, :-1]  # -1 becomes the last


def pairs_and_slots(expert_ids_TK: Tensor, num_experts: int, num_places: int) -> tuple[Tensor, Tensor]:
    """Tokens that have an expert at each place, and how many slots they have there; both int64 [num_places]."""
    places_TK = expert_ids_TK // (num_experts // num_places)
    return visits(places_TK, num_places).sum(dim=0), count_by_expert(places_TK, num_places, places_TK >= 0)


def spread(rows_T: Tensor, metadata: DispatchMetadata) -> Tensor:
    """[T, ...] -> [R, ...]: rows go to their token's experts, the way that tokens went."""
    for hop in metadata.hops:
        rows_T = all_to_all_rows(permute(rows_T, hop.order), hop.splits)
    return permute(rows_T, metadata.order)


def start_collecting(rows_RD: Tensor, metadata: DispatchMetadata) -> Callable[[], Tensor]:
    """:func:`collect` that does not wait for the last exchange."""
    rows = sum_rows(rows_RD, metadata.order)
    first, *others = metadata.hops
    for hop in reversed(others):
        rows = sum_rows(all_to_all_rows(rows, hop.splits.reverse()), hop.order)
    under_way = start_all_to_all(rows, first.splits.reverse())
    return lambda: sum_rows(finish_all_to_all(under_way), first.order)


def collect(rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
    """[R, D] -> [T, D]: rows go back to their token, and add up; the transpose of :func:`spread`."""
    return start_collecting(rows_RD, metadata)()


class Departure:
    """Connects the rows that a codec's bytes became to the tokens that they were made of, for gradients.

    As with ``start_all_to_all``, the exchange of gradients is started where the rows arrived and waited for where the
    tokens left, so that what lies between overlaps with it backward.

    Args:
        tokens_TD: What left.
    """

    def __init__(self, tokens_TD: Tensor) -> None:
        self._way_back: list[Callable[[], Tensor]] = []
        self._handle = _Leave.apply(tokens_TD, self._way_back)

    def arrive(self, rows_RD: Tensor, metadata: DispatchMetadata) -> Tensor:
        """A view of ``rows_RD`` with a gradient that goes back to the tokens."""
        return _Arrive.apply(self._handle, rows_RD, metadata, self._way_back)


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, way_back: list[Callable[[], Tensor]]) -> Tensor:
        ctx.way_back = way_back
        return tokens_TD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.way_back.pop()(), None


class _Arrive(Function):
    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,
        rows_RD: Tensor,
        metadata: DispatchMetadata,
        way_back: list[Callable[[], Tensor]],
    ) -> Tensor:
        ctx.route, ctx.way_back = metadata, way_back
        return rows_RD.view_as(rows_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.way_back.append(start_collecting(grad_RD, ctx.route))
        return grad_RD.new_empty(0), None, None, None


class _Combine(Function):
    """:func:`collect`, with a codec backward."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, metadata: DispatchMetadata, codec: RowCodec) -> Tensor:
        ctx.route, ctx.codec = metadata, codec
        return collect(rows_RD, metadata)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        sent_R = spread(ctx.codec.encode(grad_TD), ctx.route)
        return ctx.codec.decode(sent_R, grad_TD), None, None
