"""Bring each token to the ranks of its experts, and the results back.

A dispatcher is the only part of the layer that knows where experts are. All dispatchers share one interface, and keep
nothing between calls: ``dispatch`` returns an exchange, whose ``mix`` waits for the tokens, lets the experts compute,
and brings the results back.

A token is sent once to each rank that has experts of it, not once for each expert (as in DeepEP,
https://github.com/deepseek-ai/DeepEP): that rank copies it for its experts, and adds up their results before it sends
them back. Weights are sent with the tokens, and applied by the experts, so no result is kept for their gradient.

Tokens may go in chunks. Then the tokens of one chunk travel while the experts compute another, and its results while
they compute the next; the backward pass does the same in reverse order (``moe/hops.py``):

    experts      | chunk 0 | chunk 1 | chunk 2 | ...
    under way    | tokens 1, 2, ... | results 0, tokens 2, ... | results 1, ...

Every rank has the same number of chunks, some of them perhaps empty, and starts the same exchanges in the same order.

P is the number of tokens (of a chunk) on a rank after dispatch, G the number of ranks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.moe.hops import Flight, Hop, RowCodec, arrive, collect, depart, pass_back, pass_on, send_back
from moefoundry.ops.all_to_all import Splits, all_to_all_rows
from moefoundry.ops.permute import RowOrder, count_by_expert, order_by_expert
from moefoundry.ops.recompute import last_operand_is_there, on_the_host

Mix = Callable[[Tensor, Tensor, RowOrder], Tensor]
"""``(tokens_PD, weights_PK, order) -> mixed_PD``: the weighted sum of each token's experts on this rank."""


class Experts(Protocol):
    """The experts, as an exchange calls them: as a :data:`Mix`, or once for all chunks."""

    def __call__(self, tokens_PD: Tensor, weights_PK: Tensor, order: RowOrder) -> Tensor:
        """Mix each token's experts on this rank."""
        ...

    def in_chunks(self, links: Any, schedule: Callable[[Any, Mix], Any]) -> Any:
        """Call ``schedule(links, mix)``.

        Args:
            links: The tensors through which the gradients of all chunks leave.
            schedule: Mixes one chunk after the other, and returns tensors through which the gradients come.
        """
        ...


class Exchange(Protocol):
    """Tokens that have been sent to their experts; computation before :meth:`mix` overlaps with it."""

    def mix(self, experts: Experts) -> Tensor:
        """Wait for the tokens, mix their experts, and bring the results back, [T, D]; called once."""
        ...


class TokenDispatcher(Protocol):
    """Interface of dispatchers."""

    def dispatch(
        self,
        tokens_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        kept_TK: Tensor | None = None,
        chunks: int = 1,
    ) -> Exchange:
        """Start to send each token to the ranks of its experts.

        Args:
            tokens_TD: This rank's tokens, [T, D].
            topk_expert_ids_TK: int64 [T, K], distinct within a token.
            topk_weights_TK: [T, K], differentiable; sent with the tokens.
            kept_TK: bool [T, K], slots that are sent; None sends all.
            chunks: Number of chunks in which the tokens are sent, the same on all ranks.
        """
        ...


class LocalDispatcher:
    """Dispatcher for experts that are all on this rank: tokens stay, and there is nothing to send in chunks."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self,
        tokens_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        kept_TK: Tensor | None = None,
        chunks: int = 1,
    ) -> Exchange:
        order = order_by_expert(topk_expert_ids_TK, self.num_experts, kept_TK)
        return _AtHome(tokens_TD, topk_weights_TK, order)


class _AtHome:
    """The exchange of a :class:`LocalDispatcher`."""

    def __init__(self, tokens_TD: Tensor, weights_TK: Tensor, order: RowOrder) -> None:
        self.arguments = tokens_TD, weights_TK, order

    def mix(self, experts: Experts) -> Tensor:
        return experts(*self.arguments)


class Chunk(Protocol):
    """One chunk of an exchange: its tokens are under way, then its results.

    Attributes:
        links: The tensors through which its gradients leave, and later come.
    """

    links: tuple[Tensor, ...]

    def pass_on(self) -> None:
        """Wait for the hops before the last one, and start the last one; nothing if there is one hop."""
        ...

    def arrive(self) -> tuple[Tensor, Tensor, RowOrder]:
        """Wait for the last hop: the arguments of :data:`Mix`."""
        ...

    def send_back(self, mixed_PD: Tensor) -> None:
        """Start to send the results back."""
        ...

    def pass_back(self) -> None:
        """Wait for the hops but the last one on the way back, and start the last one."""
        ...


class ChunkedExchange:
    """An exchange of one or more chunks.

    Args:
        chunks: The chunks, in the order of their tokens.
        collect: Waits for the results, [T, D], of chunks that have all been sent back.
    """

    def __init__(self, chunks: Sequence[Chunk], collect: Callable[[], Tensor]) -> None:
        self.chunks, self.collect = chunks, collect

    def mix(self, experts: Experts) -> Tensor:
        if len(self.chunks) == 1:
            (chunk,) = self.chunks
            chunk.pass_on()
            mixed_PD = experts(*chunk.arrive())
            last_operand_is_there()
            chunk.send_back(mixed_PD)
            chunk.pass_back()
        else:
            links = experts.in_chunks([chunk.links for chunk in self.chunks], self._schedule)
            for chunk, link in zip(self.chunks, links, strict=True):
                chunk.links = link
        return self.collect()

    def _schedule(self, links: Sequence[tuple[Tensor, ...]], mix: Mix) -> list[tuple[Tensor, ...]]:
        """Mix chunk after chunk, while the tokens of the next and the results of the one before are under way."""
        for chunk, link in zip(self.chunks, links, strict=True):
            chunk.links = link
        self.chunks[0].pass_on()
        for before, chunk, following in zip(
            (None, *self.chunks[:-1]), self.chunks, (*self.chunks[1:], None), strict=True
        ):
            if following is not None:
                following.pass_on()
            chunk.send_back(mix(*chunk.arrive()))
            if before is not None:
                before.pass_back()
        self.chunks[-1].pass_back()
        return [chunk.links for chunk in self.chunks]


class AllToAllDispatcher:
    """Dispatcher for experts that are divided among a group: rank r has experts ``r * E / G .. (r + 1) * E / G``.

    The ranks exchange counts of tokens (the one time that a layer waits for the host, and not where it is recomputed),
    then the tokens, sorted by rank, and beside them the experts and weights of each. A rank may receive no tokens, or
    all.

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
        check_divides(num_experts, group)
        self.num_experts = num_experts
        self.group = group

    def dispatch(
        self,
        tokens_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        kept_TK: Tensor | None = None,
        chunks: int = 1,
    ) -> Exchange:
        expert_ids_TK = topk_expert_ids_TK if kept_TK is None else topk_expert_ids_TK.where(kept_TK, -1)
        ids, slots_T2K = expert_ids_TK.tensor_split(chunks), pack_slots(topk_weights_TK, expert_ids_TK)
        plans = self._plan(ids)
        hops = [next_hop(each, self.num_experts, splits[0]) for each, (splits, _) in zip(ids, plans, strict=True)]
        slots, tokens = ([Flight() for _ in hops] for _ in range(2))
        slot_links = depart(slots_T2K, hops, slots)
        token_links = depart(tokens_TD, hops, tokens, self.codec)
        parts = [
            _RowsInChunk(links, flights, hop, splits[1:], num_rows, self.num_experts, self.codec)
            for links, flights, hop, (splits, num_rows) in zip(
                zip(slot_links, token_links, strict=True), zip(slots, tokens, strict=True), hops, plans, strict=True
            )
        ]
        return ChunkedExchange(parts, lambda: collect([part.links[0] for part in parts], hops, tokens, self.codec))

    def _plan(self, chunks: Sequence[Tensor]) -> list[tuple[list[Splits], int]]:
        """Agree on the splits of each hop, and on the number of rows for this rank's experts, for each chunk.

        Args:
            chunks: Experts of the tokens of each chunk, int64 [T, K].
        """
        ranks = self.group.size()
        counted = [torch.stack(pairs_and_slots(ids_TK, self.num_experts, ranks), dim=1) for ids_TK in chunks]
        counts_GC2, one_each = torch.stack(counted, dim=1), [1] * ranks
        received_GC2 = all_to_all_rows(counts_GC2, Splits(one_each, one_each, self.group))
        counts_C3G = torch.stack([counts_GC2[..., 0], *received_GC2.unbind(2)]).movedim(2, 0)
        return [([Splits(send, receive, self.group)], sum(rows)) for send, receive, rows in on_the_host(counts_C3G)]


class _RowsInChunk:
    """A :class:`Chunk` of an :class:`AllToAllDispatcher`.

    Args:
        links: Links of the slots, and of the tokens.
        flights: Their flights.
        hop: The first hop, which has been started.
        splits: Splits of the hops after it.
        num_rows: Rows for this rank's experts.
        num_experts: Experts of the ranks of the first hop.
        codec: Form in which tokens are sent.
    """

    def __init__(
        self,
        links: tuple[Tensor, ...],
        flights: tuple[Flight, ...],
        hop: Hop,
        splits: Sequence[Splits],
        num_rows: int,
        num_experts: int,
        codec: RowCodec | None,
    ) -> None:
        self.links, self.hops, self.splits = links, [hop], splits
        self.slots, self.tokens = flights
        self.num_rows, self.codec = num_rows, codec
        self.num_experts = num_experts // hop.splits.group.size()

    def pass_on(self) -> None:
        slots_link, tokens_link = self.links
        for splits in self.splits:
            weights_PK, ids_PK = self._land_slots(slots_link)
            arriving, onward = self.hops[-1], next_hop(ids_PK, self.num_experts, splits)
            (slots_link,) = depart(pack_slots(weights_PK, ids_PK), [onward], [self.slots])
            tokens_link = pass_on(tokens_link, arriving, onward, self.tokens)
            self.num_experts //= splits.group.size()
            self.hops.append(onward)
        self.links = slots_link, tokens_link

    def arrive(self) -> tuple[Tensor, Tensor, RowOrder]:
        slots_link, tokens_link = self.links
        weights_PK, ids_PK = self._land_slots(slots_link)
        order = order_by_expert(ids_PK, self.num_experts, ids_PK >= 0, self.num_rows)
        return arrive(tokens_link, self.hops[-1], self.tokens, self.codec), weights_PK, order

    def send_back(self, mixed_PD: Tensor) -> None:
        self.links = (send_back(mixed_PD, self.hops[-1], self.tokens, self.codec),)

    def pass_back(self) -> None:
        for arriving, onward in zip(self.hops[-2::-1], self.hops[:0:-1], strict=True):
            self.links = (pass_back(self.links[0], arriving, onward, self.tokens),)

    def _land_slots(self, link: Tensor) -> tuple[Tensor, Tensor]:
        return unpack_slots(arrive(link, self.hops[-1], self.slots), self.hops[-1], self.num_experts)


def check_divides(num_experts: int, group: dist.ProcessGroup) -> None:
    """Raise ``ValueError`` where the size of ``group`` does not divide ``num_experts``."""
    if num_experts % group.size():
        raise ValueError(f"{num_experts} experts do not divide among {group.size()} ranks")


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
