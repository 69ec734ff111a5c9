"""Dispatch over ranks brings every row to its expert and back, whatever the routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.ops.permute import RowOrder, permute, permute_slots, sum_rows
from tests.collectives import CrossingBytes
from tests.distributed import run_distributed

TOKENS, WIDTH, EXPERTS, TOP_K = 12, 6, 8, 2
ROUTINGS = [
    "random",
    "all_to_one_rank",
    "one_rank_receives_none",
    "uneven_tokens",
    "no_tokens_on_rank_0",
    "some_dropped",
    "all_dropped",
]


class Case(NamedTuple):
    """Tokens [T, D], expert ids [T, K], weights [T, K] and which slots are kept, of one rank; float64."""

    tokens: Tensor
    ids: Tensor
    weights: Tensor
    kept: Tensor | None


class Result(NamedTuple):
    """What a rank's tokens became, and the gradients of its tokens and weights."""

    out: Tensor
    grad_tokens: Tensor
    grad_weights: Tensor
    received: int


def case(routing: str, rank: int, ranks: int) -> Case:
    generator = torch.Generator().manual_seed(100 + rank)
    count = TOKENS
    if routing == "uneven_tokens":
        count = TOKENS + 5 * rank
    if routing == "no_tokens_on_rank_0" and rank == 0:
        count = 0
    experts = torch.arange(EXPERTS)
    if routing == "all_to_one_rank":
        experts = experts[-EXPERTS // ranks :]
    if routing == "one_rank_receives_none":
        experts = experts[EXPERTS // ranks :]
    scores = torch.rand(count, len(experts), generator=generator)
    ids = experts[scores.topk(TOP_K, dim=-1).indices]
    tokens = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, TOP_K, generator=generator, dtype=torch.float64)
    kept = None
    if "dropped" in routing:
        kept = torch.rand(count, TOP_K, generator=generator) < (0.6 if routing == "some_dropped" else 0.0)
    return Case(tokens.requires_grad_(), ids, weights.requires_grad_(), kept)


def expert(rows: Tensor, index: int) -> Tensor:
    """A stand-in for an expert: each does something else, and none is linear."""
    return torch.sin(rows * (index + 1)) + index


class Sines:
    """The experts of a rank, numbered from ``first``; they note how many rows each chunk has."""

    def __init__(self, first: int) -> None:
        self.first, self.received = first, []

    def __call__(self, tokens: Tensor, weights: Tensor, order: RowOrder) -> Tensor:
        rows = permute(tokens, order)
        self.received.append(len(rows))
        groups = rows.split(order.tokens_per_expert_E.tolist())
        rows = torch.cat([expert(group, self.first + i) for i, group in enumerate(groups)])
        return sum_rows(rows * permute_slots(weights, order).unsqueeze(1).to(rows.dtype), order)

    def in_chunks(self, links: Any, schedule: Callable[..., Any]) -> Any:
        return schedule(links, self)


def dispatch_and_combine(
    dispatcher: Any, routing: str, rank: int, ranks: int, first_expert: int, chunks: int = 1
) -> Result:
    tokens, ids, weights, kept = case(routing, rank, ranks)
    experts = Sines(first_expert)
    out = dispatcher.dispatch(tokens, ids, weights, kept, chunks).mix(experts)
    (out * torch.arange(1.0, WIDTH + 1)).sum().backward()
    assert len(experts.received) == chunks
    return Result(out.detach(), tokens.grad, weights.grad, sum(experts.received))


def one_by_one(routing: str, rank: int, ranks: int) -> Result:
    """The same with neither dispatcher nor permutation: slot by slot."""
    tokens, ids, weights, kept = case(routing, rank, ranks)
    out = tokens * 0
    for t in range(len(tokens)):
        for k in range(TOP_K):
            if kept is None or kept[t, k]:
                out = out.index_add(0, torch.tensor([t]), weights[t, k] * expert(tokens[t : t + 1], int(ids[t, k])))
    (out * torch.arange(1.0, WIDTH + 1)).sum().backward()
    grad_weights = torch.zeros_like(weights) if weights.grad is None else weights.grad
    return Result(out.detach(), tokens.grad, grad_weights, 0)


def groups_of_nodes(nodes: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """For each rank, those of its place on other nodes, and those of its node; all ranks make all groups."""
    ranks = torch.arange(dist.get_world_size()).view(nodes, -1)
    between, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist())
    inside, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    return between, inside


def dispatcher_of(kind: str, num_experts: int = EXPERTS) -> Any:
    from moefoundry.moe.dispatch import AllToAllDispatcher, LocalDispatcher
    from moefoundry.moe.two_hop import TwoHopDispatcher

    if kind == "local":
        return LocalDispatcher(num_experts)
    if kind == "one_hop":
        return AllToAllDispatcher(num_experts, dist.group.WORLD)
    return TwoHopDispatcher(num_experts, dist.group.WORLD, *groups_of_nodes(2))


CHUNKS = [1, 2, 5, 20]
"""The last is more than there are tokens, so that some chunks are empty on every rank."""


def on_ranks(kind: str, routings: list[str]) -> list[list[Result]]:
    """For each routing, the results by number of chunks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dispatcher, first = dispatcher_of(kind), rank * EXPERTS // ranks

    def results(routing: str) -> list[Result]:
        return [dispatch_and_combine(dispatcher, routing, rank, ranks, first, chunks) for chunks in CHUNKS]

    return [results(routing) for routing in routings]


def assert_same(result: Result, expected: Result) -> None:
    for name in ("out", "grad_tokens", "grad_weights"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_local_dispatcher_equals_slot_by_slot(routing: str) -> None:
    assert_same(dispatch_and_combine(dispatcher_of("local"), routing, 0, 2, 0), one_by_one(routing, 0, 2))


def test_the_local_dispatcher_has_nothing_to_send_in_chunks() -> None:
    experts, (tokens, ids, weights, _) = Sines(0), case("random", 0, 2)
    dispatcher_of("local").dispatch(tokens, ids, weights, chunks=3).mix(experts)
    assert experts.received == [TOKENS * TOP_K]


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("one_hop", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("one_hop", 4), ("two_hop", 2))),
        ("two_hop", 4),
    ],
)
def test_row17_experts_on_ranks_equal_slot_by_slot(kind: str, ranks: int) -> None:
    results = run_distributed(on_ranks, ranks, kind, ROUTINGS)
    for index, routing in enumerate(ROUTINGS):
        cases = [case(routing, rank, ranks) for rank in range(ranks)]
        for rank in range(ranks):
            whole, *in_chunks = results[rank][index]
            assert_same(whole, one_by_one(routing, rank, ranks))
            for other in in_chunks:  # every sum has the same addends in the same order
                assert all(torch.equal(a, b) for a, b in zip(other[:3], whole[:3], strict=True))
                assert other.received == whole.received
        received = [result[index][0].received for result in results]
        assert sum(received) == sum(c.ids.numel() if c.kept is None else int(c.kept.sum()) for c in cases)
        if routing == "all_to_one_rank":
            assert received[:-1] == [0] * (ranks - 1)
        if routing == "one_rank_receives_none":
            assert received[0] == 0


def quantized(rows: Tensor) -> Tensor:
    """What FP8 rows stand for; their gradient is that of ``rows``."""
    from moefoundry.ops.fp8 import Tile, dequantize, quantize

    values = dequantize(quantize(rows.detach().float(), Tile.ROW)).to(rows.dtype)
    return rows + (values - rows).detach()


class QuantizedBackward(torch.autograd.Function):
    """The identity, whose gradient travels in FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return quantized(grad)


def in_fp8(kind: str, routings: list[str], chunks: int) -> list[tuple[Result, Result]]:
    """On this rank: what the dispatcher gives with FP8 on its spreading legs, and the same slot by slot."""
    from moefoundry.ops.fp8.wire import Fp8Codec

    rank, ranks = dist.get_rank(), dist.get_world_size()
    dispatcher = dispatcher_of(kind)
    dispatcher.codec = Fp8Codec()
    scale = torch.linspace(0.1, 3.0, WIDTH)
    results = []
    for routing in routings:
        tokens, ids, weights, kept = (x if x is None else x.detach() for x in case(routing, rank, ranks))
        pair = []
        for ours in (True, False):
            leaves = [x.float().requires_grad_() for x in (tokens, weights)]
            if ours:
                exchange = dispatcher.dispatch(leaves[0], ids, leaves[1], kept, chunks)
                out = exchange.mix(Sines(rank * EXPERTS // ranks))
            else:
                sent, out = quantized(leaves[0]), leaves[0] * 0
                for t, k in ((t, k) for t in range(len(ids)) for k in range(TOP_K)):
                    if kept is None or kept[t, k]:
                        one = leaves[1][t, k] * expert(sent[t : t + 1], int(ids[t, k]))
                        out = out.index_add(0, torch.tensor([t]), one)
                out = QuantizedBackward.apply(out)
            (out.sin() * scale).sum().backward()
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
            pair.append(Result(out.detach(), *grads, 0))
        results.append(tuple(pair))
    return results


@pytest.mark.parametrize(("kind", "ranks", "chunks"), [("one_hop", 2, 1), ("one_hop", 2, 3), ("two_hop", 4, 3)])
def test_rows_in_fp8_are_quantized_once_each_way_and_sums_are_not(kind: str, ranks: int, chunks: int) -> None:
    for results in run_distributed(in_fp8, ranks, kind, ROUTINGS, chunks):
        for routing, (result, expected) in zip(ROUTINGS, results, strict=True):
            for name in ("out", "grad_tokens", "grad_weights"):
                got, wanted = getattr(result, name), getattr(expected, name)
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=f"{routing}: {name}")


class Traffic(NamedTuple):
    """Bytes over the border of two pretended nodes, and to other ranks; all ranks together, with what is behind them:
    the distinct (token, node) and (token, rank) pairs that are not at home."""

    crossing: int
    sent: int
    node_pairs: int
    rank_pairs: int


WIDE, MANY = 1024, 64  # a row is 4 KiB


def count_traffic(kind: str, top_k: int, fp8: bool = False, chunks: int = 1) -> Traffic:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    num_experts, nodes = 16, 2
    generator = torch.Generator().manual_seed(rank)
    dtype = torch.bfloat16 if fp8 else torch.float32
    tokens = torch.randn(MANY, WIDE, generator=generator).to(dtype).requires_grad_()
    ids = torch.rand(MANY, num_experts, generator=generator).topk(top_k, dim=-1).indices
    weights = torch.rand(MANY, top_k, generator=generator).requires_grad_()
    dispatcher = dispatcher_of(kind, num_experts)
    if fp8:
        from moefoundry.ops.fp8.wire import Fp8Codec

        dispatcher.codec = Fp8Codec()
    with CrossingBytes(ranks // nodes) as counter:
        dispatcher.dispatch(tokens, ids, weights, chunks=chunks).mix(Sines(0)).sum().backward()
    node_pairs = pairs_away(ids, num_experts, nodes, rank // (ranks // nodes))
    rank_pairs = pairs_away(ids, num_experts, ranks, rank)
    numbers = torch.tensor([counter.crossing, counter.sent, node_pairs, rank_pairs])
    dist.all_reduce(numbers)
    return Traffic(*numbers.tolist())


def pairs_away(ids: Tensor, num_experts: int, places: int, home: int) -> int:
    """How many (token, place) pairs there are, without those of the place ``home``."""
    return sum(len(set(row) - {home}) for row in (ids // (num_experts // places)).tolist())


LEGS = 4  # dispatch, combine, and both backwards
FRINGE = 1.02  # counts, numbers and weights of experts


@pytest.mark.parametrize("top_k", [2, 6])
def test_one_hop_sends_a_token_once_to_each_rank(top_k: int) -> None:
    traffic = run_distributed(count_traffic, 4, "one_hop", top_k, False, top_k // 2)[0]  # in one chunk, or in three
    needed = LEGS * traffic.rank_pairs * WIDE * 4
    assert needed <= traffic.sent <= FRINGE * needed


@pytest.mark.parametrize("top_k", [2, 6])
def test_two_hops_cross_the_border_once_for_each_token_and_node(top_k: int) -> None:
    traffic = run_distributed(count_traffic, 4, "two_hop", top_k)[0]
    needed = LEGS * traffic.node_pairs * WIDE * 4
    assert needed <= traffic.crossing <= FRINGE * needed
    one_hop = run_distributed(count_traffic, 4, "one_hop", top_k)[0]
    assert one_hop.crossing > needed


@pytest.mark.parametrize("kind", ["one_hop", "two_hop"])
def test_an_fp8_leg_takes_at_most_52_percent_of_bf16(kind: str) -> None:
    traffic = run_distributed(count_traffic, 4, kind, 6, True)[0]
    bf16_leg = 2 * WIDE * (traffic.rank_pairs if kind == "one_hop" else traffic.node_pairs)
    moved = traffic.sent if kind == "one_hop" else traffic.crossing
    assert moved <= (2 * 0.52 + 2) * bf16_leg * FRINGE
    assert moved >= (2 * 0.5 + 2) * bf16_leg


# Expert e is on rank e // 2. Token 0 has two slots on rank 1 and one on rank 0; token 1 has a slot that is not kept.
HAND_IDS = torch.tensor([[2, 0, 3], [5, -1, 4]])


def test_places_of_the_example_worked_out_by_hand() -> None:
    from moefoundry.moe.dispatch import needed_places, pairs_and_slots

    assert needed_places(HAND_IDS // 2, 4).tolist() == [[True, True, False, False], [False, False, True, False]]
    pairs, slots = pairs_and_slots(HAND_IDS, 8, 4)
    assert pairs.tolist() == [1, 1, 1, 0]
    assert slots.tolist() == [1, 2, 2, 0]


def bad_dispatcher(kind: str) -> None:
    dispatcher_of(kind, 3)


@pytest.mark.parametrize("kind", ["one_hop", "two_hop"])
def test_experts_that_do_not_divide_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="3 experts do not divide among 2 ranks"):
        run_distributed(bad_dispatcher, 2, kind)


def groups_that_do_not_fit() -> None:
    from moefoundry.moe.two_hop import TwoHopDispatcher

    TwoHopDispatcher(EXPERTS, dist.group.WORLD, dist.group.WORLD, dist.group.WORLD)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 nodes of 2 ranks are not 2 ranks"):
        run_distributed(groups_that_do_not_fit, 2)
