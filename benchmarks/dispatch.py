"""Dispatch and combine over ranks against two bare all-to-alls: what routing costs beside moving bytes.

A rank routes T tokens to K of E experts at random, which gives the experts T * K rows of D fp32 values. The bare sides
move rows as they lie, there and back, forward only like ours:

- *routed rows*: the T * K rows, one for each (token, expert), into buffers that exist;
- *routed rows, new buffers*: the same, each into a new buffer, as code under autograd has to. Ours does;
- *rows sent*: only the (token, rank) pairs that our dispatch sends, into new buffers. What is left is its own work:
  counting, sorting, gathering, copying to experts, and two sums.

``dispatch_cpu`` compares CPU time, which other work on the machine hardly changes, and leaves out the copies to experts
and their sum: experts return the tokens as they came. Its notes have the time of each part.
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

RANKS, ROUNDS, CPU_ROUNDS = 4, 41, 21
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


def compare(quick: bool) -> list[Comparison]:
    """Three comparisons for each case."""
    rounds = 1 if quick else ROUNDS
    return [comparison for case in (CASES[:1] if quick else CASES) for comparison in _compare(case, rounds)]


def compare_cpu(quick: bool) -> tuple[list[Comparison], list[str]]:
    """A comparison for each case, and a note on the parts."""
    rounds = 1 if quick else CPU_ROUNDS
    cases = CASES[:1] if quick else CASES
    found = list(zip(cases, on_ranks(_measure_cpu, RANKS, [tuple(case) for case in cases], rounds), strict=True))
    comparisons = [
        Comparison(
            benchmark="dispatch + combine, without copies to experts",
            case=_sizes(case),
            unit="CPU s",
            peer="two all_to_all_single: rows sent, new buffers",
            ours=seconds["ours"],
            theirs=seconds["sent_new"],
            target=TARGET,
        )
        for case, seconds in found
    ]
    return comparisons, [_note(case, seconds) for case, seconds in found]


def _compare(case: Case, rounds: int) -> list[Comparison]:
    seconds = on_ranks(_measure, RANKS, tuple(case), rounds)
    return [
        Comparison(
            benchmark="dispatch + combine",
            case=_sizes(case),
            unit="s",
            peer=f"two all_to_all_single: {description}",
            ours=seconds["ours"],
            theirs=seconds[peer],
            target=TARGET if peer != "sent_new" else None,
        )
        for peer, description in PEERS.items()
    ]


def _sizes(case: Case) -> str:
    return f"{case}: {RANKS} ranks x {case.mebibytes:.0f} MiB"


def _note(case: Case, seconds: dict[str, list[float]]) -> str:
    def milliseconds(name: str) -> str:
        return f"{1e3 * statistics.median(seconds[name]):.2f}"

    parts = ", ".join(f"{name} {milliseconds(key)}" for key, name in PARTS.items())
    return (
        f"dispatch, {case}, CPU ms of one of {RANKS} ranks, medians: bare exchanges of the rows sent "
        f"{milliseconds('sent_new')}; dispatch + combine {milliseconds('ours')}; its parts, each alone: {parts}"
    )


class Copies:
    """Experts that copy tokens to rows, and add up the rows."""

    def __call__(self, tokens: torch.Tensor, weights: torch.Tensor, order: RowOrder) -> torch.Tensor:
        return sum_rows(permute(tokens, order), order)


class Nothing:
    """Experts that return the tokens."""

    def __call__(self, tokens: torch.Tensor, weights: torch.Tensor, order: RowOrder) -> torch.Tensor:
        return tokens


class Inputs(NamedTuple):
    """What a rank has: tokens, their experts and weights, and the splits of the rows sent and of the routed rows."""

    tokens: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    dispatcher: Any
    sent: tuple[list[int], list[int]]
    routed: tuple[list[int], list[int]]


def _inputs(case: Case) -> Inputs:
    from moefoundry.moe.dispatch import AllToAllDispatcher, pairs_and_slots

    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randn(case.tokens, case.width, generator=generator)
    ids = torch.rand(case.tokens, case.experts, generator=generator).topk(case.top_k, dim=-1).indices
    weights = torch.rand(case.tokens, case.top_k, generator=generator)
    sent, routed = (_splits(counts) for counts in pairs_and_slots(ids, case.experts, RANKS))
    return Inputs(tokens, ids, weights, AllToAllDispatcher(case.experts, dist.group.WORLD), sent, routed)


def _bare_new(rows: torch.Tensor, send: list[int], receive: list[int]) -> None:
    came = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(came, rows[: sum(send)], receive, send)
    dist.all_to_all_single(rows.new_empty(sum(send), rows.shape[1]), came, send, receive)


def _measure(sizes: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    case = Case(*sizes)
    tokens, ids, weights, dispatcher, sent, routed = _inputs(case)
    there, back = (tokens.new_zeros(sum(split), case.width) for split in routed)

    def bare() -> None:
        send, receive = routed
        dist.all_to_all_single(back, there, receive, send)
        dist.all_to_all_single(there, back, send, receive)

    contenders = {
        "ours": lambda: dispatcher.dispatch(tokens, ids, weights).mix(Copies()),
        "routed": bare,
        "routed_new": lambda: _bare_new(there, *routed),
        "sent_new": lambda: _bare_new(there, *sent),
    }
    with torch.no_grad():
        return in_turn(contenders, rounds, warmup=2, ready=dist.barrier)


def _measure_cpu(cases: list[tuple[int, ...]], rounds: int) -> list[dict[str, list[float]]]:
    return [_measure_cpu_of(Case(*sizes), rounds) for sizes in cases]


def _measure_cpu_of(case: Case, rounds: int) -> dict[str, list[float]]:
    tokens, ids, weights, dispatcher, sent, _ = _inputs(case)
    rows = tokens.new_zeros(sum(sent[0]), case.width)
    contenders = {
        "ours": lambda: dispatcher.dispatch(tokens, ids, weights).mix(Nothing()),
        "sent_new": lambda: _bare_new(rows, *sent),
        **_parts(dispatcher, tokens, ids, weights),
    }
    with torch.no_grad():
        return in_turn(contenders, rounds, warmup=2, ready=dist.barrier, clock=time.process_time)


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
