"""Bring each token to the ranks of its experts, and the results back.

A dispatcher is the only part of the layer that knows where experts are. All dispatchers share one interface, and keep
nothing between calls: ``dispatch`` returns a frozen :class:`DispatchMetadata` for ``combine``.

A token is sent once to each rank that has experts of it, not once for each expert (as in DeepEP,
https://github.com/deepseek-ai/DeepEP): that rank copies it for its experts, and adds up their results before it sends
them back. Weights are sent with the tokens, and applied by the experts, so no result is kept for their gradient.

Dispatch copies tokens to ranks, combine sums what comes back; each is the other's transpose, and so its backward pass.
The two exchanges that copy (dispatch, and combine's backward pass) can send rows in another form: :class:`RowCodec`.

P is the number of tokens on a rank after dispatch, G the number of ranks of a group.
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
from moefoundry.ops.permute import RowOrder, count_by_expert, gather_rows, order_by_expert, sum_of_rows


@dataclass(frozen=True)
class Hop:
    """One exchange of tokens among the ranks of a group.

    Attributes:
        order: Order of the (token, rank) pairs, by rank.
        splits: Number of tokens sent to each rank, and received from it.
    """

    order: RowOrder
    splits: Splits


@dataclass(frozen=True)
class DispatchMetadata:
    """The slots of the P tokens on this rank after dispatch, and the way back.

    Attributes:
        weights_PK: Weight of each slot in the sum over its token's experts; differentiable.
        order: Order of the slots that are for this rank's experts: its R rows.
        hops: The exchanges that brought the tokens; none if all experts are on this rank.
    """

    weights_PK: Tensor
    order: RowOrder
    hops: tuple[Hop, ...] = ()


class PendingExchange(NamedTuple):
    """A dispatch that has been started.

    Attributes:
        wait: Wait for the tokens, [P, D], and their metadata. Call it once; computation before it overlaps with the
            exchange.
    """

    wait: Callable[[], tuple[Tensor, DispatchMetadata]]


class TokenDispatcher(Protocol):
    """Interface of dispatchers."""

    def dispatch(
        self, tokens_TD: Tensor, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor, kept_TK: Tensor | None = None
    ) -> PendingExchange:
        """Start to send each token to the ranks of its experts.

        Args:
            tokens_TD: This rank's tokens, [T, D].
            topk_expert_ids_TK: int64 [T, K], distinct within a token.
            topk_weights_TK: [T, K], differentiable; sent with the tokens.
            kept_TK: bool [T, K], slots that are sent; None sends all.
        """
        ...

    def combine(self, mixed_PD: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Send results back and add up those of each token, [P, D] -> [T, D]."""
        ...


class LocalDispatcher:
    """Dispatcher for experts that are all on this rank: tokens stay."""

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
    """Another form of rows for the exchange, such as FP8 with scales."""

    def encode(self, rows_TD: Tensor) -> Tensor:
        """Encode [T, D] -> [T, ...], row by row."""
        ...

    def decode(self, sent_R: Tensor, like: Tensor) -> Tensor:
        """Decode [R, ...] -> [R, D], with the width and dtype of ``like``."""
        ...


class AllToAllDispatcher:
    """Dispatcher for experts that are divided among a group: rank r has experts ``r * E / G .. (r + 1) * E / G``.

    The ranks exchange counts of tokens (the one time that a layer waits for the host), then the tokens, sorted by rank,
    and beside them the experts and weights of each. A rank may receive no tokens, or all.

    Args:
        num_experts: E, a multiple of G.
        group: The ranks of the mesh axis ``expert``.

    Attributes:
        codec: Form in which tokens, and gradients of results, are sent; None sends them as they are. A precision policy
            may set it.

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
        """Agree on the splits of each hop, and on the number of rows for this rank's experts."""
        counts_G2 = torch.stack(pairs_and_slots(expert_ids_TK, self.num_experts, self.group.size()), dim=1)
        one_each = [1] * self.group.size()
        received_G2 = all_to_all_rows(counts_G2, Splits(one_each, one_each, self.group))
        send, receive, rows = torch.stack([counts_G2[:, 0], *received_G2.unbind(1)]).tolist()
        return [Splits(send, receive, self.group)], sum(rows)


def next_hop(expert_ids_TK: Tensor, num_experts: int, splits: Splits) -> Hop:
    """Order tokens by the ranks that have an expert of them.

    Args:
        expert_ids_TK: int64 [T, K], counted among the group's experts; -1 for a slot that has none there.
        num_experts: Experts of the group, equally many on each rank.
        splits: The splits that the group agreed on.
    """
    ranks = splits.group.size()
    needed_TG = needed_places(expert_ids_TK // (num_experts // ranks), ranks)
    ranks_TG = torch.arange(ranks, device=needed_TG.device).expand_as(needed_TG)
    return Hop(order_by_expert(ranks_TG, ranks, needed_TG, sum(splits.send)), splits)


def pack_slots(weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Put weights and experts into one tensor for one exchange, [T, 2 K], fp32 or wider (exact for expert numbers)."""
    dtype = torch.promote_types(weights_TK.dtype, torch.float32)
    return torch.cat([weights_TK.to(dtype), expert_ids_TK.to(dtype)], dim=1)


def unpack_slots(slots_P2K: Tensor, hop: Hop, num_experts: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`pack_slots`: weights [P, K], and experts int64 [P, K].

    Experts are counted from this rank's first of ``num_experts``; -1 stands for experts of other ranks.
    """
    weights_PK, ids_PK = slots_P2K.chunk(2, dim=1)
    ids_PK = ids_PK.long() - hop.splits.group.rank() * num_experts
    return weights_PK, ids_PK.where((ids_PK >= 0) & (ids_PK < num_experts), -1)


def needed_places(places_TK: Tensor, num_places: int) -> Tensor:
    """Mark the places (ranks or nodes) that have a slot of each token, bool [T, num_places]; -1 is no place."""
    needed = torch.zeros(len(places_TK), num_places + 1, dtype=torch.bool, device=places_TK.device)
    return needed.scatter_(1, places_TK.remainder(num_places + 1), True)[:, :-1]  # -1 becomes the last


def pairs_and_slots(expert_ids_TK: Tensor, num_experts: int, num_places: int) -> tuple[Tensor, Tensor]:
    """Count the tokens that have an expert at each place, and their slots there; both int64 [num_places]."""
    places_TK = expert_ids_TK // (num_experts // num_places)
    return needed_places(places_TK, num_places).sum(dim=0), count_by_expert(places_TK, num_places, places_TK >= 0)


class StartedHop(NamedTuple):
    """A hop that has been started.

    Attributes:
        pending: Rows being received; only :func:`~moefoundry.ops.all_to_all.wait_for` may read them.
        sent: Stand-in for the rows sent: their shape, no memory, and the gradient that comes back.
        codec: Form in which the rows are sent.
    """

    pending: Tensor
    sent: Tensor
    codec: RowCodec | None


def start_hop(rows_T: Tensor, hop: Hop, codec: RowCodec | None = None) -> StartedHop:
    """Start to send rows [T, ...]; :func:`finish_hops` waits for them.

    In the backward pass :func:`finish_hops` starts the exchange of gradients, and this function waits for it: the
    backward pass of what is computed in between overlaps with it.
    """
    pending, sent = _StartHop.apply(rows_T, hop, codec)
    return StartedHop(pending, sent, codec)


def finish_hops(started: StartedHop, hops: list[Hop]) -> Tensor:
    """Wait for the first hop, and do the others; [P, ...]."""
    return _FinishHops.apply(started.sent, started.pending, tuple(hops), started.codec)


def spread(rows_T: Tensor, hops: tuple[Hop, ...]) -> Tensor:
    """Send rows over ``hops``, [T, ...] -> [P, ...]."""
    for hop in hops:
        rows_T = all_to_all_rows(gather_rows(rows_T, hop.order), hop.splits)
    return rows_T


def collect(rows_P: Tensor, hops: tuple[Hop, ...]) -> Tensor:
    """Send rows back and add up those of each token, [P, ...] -> [T, ...]; the transpose of :func:`spread`."""
    for hop in reversed(hops):
        rows_P = sum_of_rows(all_to_all_rows(rows_P, hop.splits.reverse()), hop.order)
    return rows_P


class _StartHop(Function):
    @staticmethod
    def forward(ctx: Any, rows_T: Tensor, hop: Hop, codec: RowCodec | None) -> tuple[Tensor, Tensor]:
        ctx.hop = hop
        sent = rows_T if codec is None else codec.encode(rows_T)
        pending = start_all_to_all(gather_rows(sent, hop.order), hop.splits)
        ctx.mark_non_differentiable(pending)
        return pending, rows_T.new_empty(1).expand(sum(hop.splits.send), *rows_T.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad_pending: Tensor) -> tuple[Tensor, None, None]:
        return sum_of_rows(wait_for(grad_pending), ctx.hop.order), None, None


class _FinishHops(Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, pending: Tensor, hops: tuple[Hop, ...], codec: RowCodec | None) -> Tensor:
        ctx.hops = hops
        rows = spread(wait_for(pending), hops[1:])
        return rows.view_as(rows) if codec is None else codec.decode(rows, sent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None, None]:
        first, *others = ctx.hops
        return start_all_to_all(collect(grad_P, tuple(others)), first.splits.reverse()), None, None, None


class _Combine(Function):
    """:func:`collect`; the backward pass spreads gradients in the codec's form."""

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
