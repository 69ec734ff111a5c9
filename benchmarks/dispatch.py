"""Dispatch and combine over ranks against two bare all-to-alls: what routing costs beside moving bytes.

A rank routes T tokens to K of E experts at random, which gives the experts T * K rows of D fp32 values. The bare sides
move rows as they lie, there and back, forward only like ours:

- *routed rows*: the T * K rows, one for each (token, expert), into buffers that exist;
- *routed rows, new buffers*: the same, each into a new buffer, as code under autograd has to. Ours does;
- *rows sent*: only the (token, rank) pairs that our dispatch sends, into new buffers. What is left is its own work.

Ours is measured with the copies to experts and their sum, for which the bare sides of routed rows do as much; and
without, where experts return the tokens as they came, beside the rows sent. The notes have the CPU time of each part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.harness import Comparison, in_turn
from benchmarks.ranks import on_ranks
from moefoundry.ops.permute import RowOrder, gather_rows, order_by_expert, permute, sum_of_rows, sum_rows

RANKS, ROUNDS = 4, 41
PEERS = {"routed": "routed rows", "routed_new": "routed rows, new buffers", "sent_new": "rows sent, new buffers"}
PARTS = {
    "counts": "agreeing on counts",
    "slots": "experts and weights, there",
    "orders": "sorting by rank and by expert",
    "gather": "copies of tokens for each rank",
    "rows": "rows, there and back",
    "sum": "sums of what comes back",
}
TARGET = round(1 / 1.3, 2)


class Case(NamedTuple):
    """Sizes of one rank."""

    tokens: int
    width: int
    experts: int
    top_k: int

    @property
    def mebibytes(self) -> float:
        """Of the routed rows."""
        return self.tokens * self.top_k * self.width * 4 / 2**20

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.width} E{self.experts} K{self.top_k}"


CASES = (
    Case(1024, 1024, 16, 2),
    Case(256, 1024, 64, 8),
    Case(1024, 1024, 64, 8),
    Case(4096, 1024, 64, 4),
    Case(2048, 1024, 64, 8),
)


def compare(quick: bool) -> tuple[list[Comparison], list[str]]:
    """Three comparisons for each case, and a note on the parts of each."""
    rounds = 1 if quick else ROUNDS
    cases = CASES[:1] if quick else CASES
    found = [(case, *on_ranks(_measure, RANKS, tuple(case), rounds)) for case in cases]
    comparisons = [comparison for case, seconds, _ in found for comparison in _compare(case, seconds)]
    return comparisons, [_note(case, cpu_seconds) for case, _, cpu_seconds in found]


def _compare(case: Case, seconds: dict[str, list[float]]) -> list[Comparison]:
    def comparison(benchmark: str, ours: str, peer: str) -> Comparison:
        return Comparison(
            benchmark=benchmark,
            case=f"{case}: {RANKS} ranks x {case.mebibytes:.0f} MiB",
            unit="s",
            peer=f"two all_to_all_single: {PEERS[peer]}",
            ours=seconds[ours],
            theirs=seconds[peer],
            target=TARGET,
        )

    with_copies = [comparison("dispatch + copies + combine", "ours", peer) for peer in ("routed", "routed_new")]
    return [*with_copies, comparison("dispatch + combine", "exchange", "sent_new")]


def _note(case: Case, seconds: dict[str, list[float]]) -> str:
    def milliseconds(name: str) -> str:
        return f"{1e3 * statistics.median(seconds[name]):.2f}"

    parts = ", ".join(f"{name} {milliseconds(key)}" for key, name in PARTS.items())
    return (
        f"dispatch, {case}, CPU ms of one of {RANKS} ranks, medians: bare exchanges of the rows sent "
        f"{milliseconds('sent_new')}; dispatch + combine {milliseconds('exchange')}; its parts, each alone: {parts}"
    )


class Copies:
    """Experts that copy tokens to rows, and add up the rows."""

    def __call__(self, tokens: torch.Tensor, weights: torch.Tensor, order: RowOrder) -> torch.Tensor:
        return sum_rows(permute(tokens, order), order)


class Nothing:
    """Experts that return the tokens."""

    def __call__(self, tokens: torch.Tensor, weights: torch.Tensor, order: RowOrder) -> torch.Tensor:
        return tokens


def _measure(sizes: tuple[int, ...], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of all sides; CPU seconds of the rows sent, of ours, and of its parts."""
    from moefoundry.moe.dispatch import AllToAllDispatcher, pairs_and_slots

    case = Case(*sizes)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randn(case.tokens, case.width, generator=generator)
    ids = torch.rand(case.tokens, case.experts, generator=generator).topk(case.top_k, dim=-1).indices
    weights = torch.rand(case.tokens, case.top_k, generator=generator)
    dispatcher = AllToAllDispatcher(case.experts, dist.group.WORLD)
    sent, routed = (_splits(counts) for counts in pairs_and_slots(ids, case.experts, RANKS))
    there, back = (tokens.new_zeros(sum(split), case.width) for split in routed)

    def bare() -> None:
        send, receive = routed
        dist.all_to_all_single(back, there, receive, send)
        dist.all_to_all_single(there, back, send, receive)

    def bare_new(send: list[int], receive: list[int]) -> None:
        came = there.new_empty(sum(receive), case.width)
        dist.all_to_all_single(came, there[: sum(send)], receive, send)
        dist.all_to_all_single(there.new_empty(sum(send), case.width), came, send, receive)

    contenders = {
        "ours": lambda: dispatcher.dispatch(tokens, ids, weights).mix(Copies()),
        "routed": bare,
        "routed_new": lambda: bare_new(*routed),
        "exchange": lambda: dispatcher.dispatch(tokens, ids, weights).mix(Nothing()),
        "sent_new": lambda: bare_new(*sent),
    }
    with torch.no_grad():
        seconds = in_turn(contenders, rounds, warmup=2, ready=dist.barrier)
        contenders = {name: contenders[name] for name in ("sent_new", "exchange")}
        contenders |= _parts(dispatcher, tokens, ids, weights)
        return seconds, in_turn(contenders, -(-rounds // 2), warmup=1, ready=dist.barrier, clock=time.process_time)


def _parts(
    dispatcher: Any, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """The parts of an exchange, each by itself, with the inputs that it has there."""
    from moefoundry.moe.dispatch import next_hop, pack_slots, unpack_slots
    from moefoundry.ops.all_to_all import all_to_all_rows

    (((splits,), num_rows),) = dispatcher._plan([ids])
    hop, local = next_hop(ids, dispatcher.num_experts, splits), dispatcher.num_experts // RANKS

    def slots() -> torch.Tensor:
        return all_to_all_rows(gather_rows(pack_slots(weights, ids), hop.order), splits)

    arrived = slots()

    def orders() -> None:
        next_hop(ids, dispatcher.num_experts, splits)
        _, here = unpack_slots(arrived, hop, local)
        order_by_expert(here, local, here >= 0, num_rows)

    rows = gather_rows(tokens, hop.order)
    return {
        "counts": lambda: dispatcher._plan([ids]),
        "slots": slots,
        "orders": orders,
        "gather": lambda: gather_rows(tokens, hop.order),
        "rows": lambda: all_to_all_rows(all_to_all_rows(rows, splits), splits.reverse()),
        "sum": lambda: sum_of_rows(rows, hop.order),
    }


def _splits(send: torch.Tensor) -> tuple[list[int], list[int]]:
    """How many rows go to each rank, and come from it."""
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    return send.tolist(), receive.tolist()
