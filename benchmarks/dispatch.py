"""Dispatch and combine over ranks against two bare all-to-alls: what routing costs beside moving bytes.

A rank routes T tokens to K of E experts at random, which gives the experts T * K rows of D fp32 values. The bare sides
move rows as they lie, there and back, forward only like ours:

- *routed rows*: the T * K rows, one for each (token, expert), into buffers that exist;
- *routed rows, new buffers*: the same, each into a new buffer, as code under autograd has to. Ours does;
- *rows sent*: only the (token, rank) pairs that our dispatch sends, into new buffers. What is left is its own work:
  counting, sorting, gathering, copying to experts, and two sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.harness import Comparison, in_turn
from benchmarks.ranks import on_ranks
from moefoundry.ops.permute import RowOrder, permute, sum_rows

RANKS, ROUNDS = 4, 41
PEERS = {"routed": "routed rows", "routed_new": "routed rows, new buffers", "sent_new": "rows sent, new buffers"}
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


class Copies:
    """Experts that copy tokens to rows, and add up the rows: what the exchange is for."""

    def __call__(self, tokens: torch.Tensor, weights: torch.Tensor, order: RowOrder) -> torch.Tensor:
        return sum_rows(permute(tokens, order), order)


def compare(quick: bool) -> list[Comparison]:
    """Three comparisons for each case."""
    rounds = 1 if quick else ROUNDS
    return [comparison for case in (CASES[:1] if quick else CASES) for comparison in _compare(case, rounds)]


def _compare(case: Case, rounds: int) -> list[Comparison]:
    seconds = on_ranks(_measure, RANKS, tuple(case), rounds)
    return [
        Comparison(
            benchmark="dispatch + combine",
            case=f"{case}: {RANKS} ranks x {case.mebibytes:.0f} MiB",
            unit="s",
            peer=f"two all_to_all_single: {description}",
            ours=seconds["ours"],
            theirs=seconds[peer],
            target=TARGET if peer != "sent_new" else None,
        )
        for peer, description in PEERS.items()
    ]


def _measure(sizes: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    from moefoundry.moe.dispatch import AllToAllDispatcher, pairs_and_slots

    case, group = Case(*sizes), dist.group.WORLD
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randn(case.tokens, case.width, generator=generator)
    ids = torch.rand(case.tokens, case.experts, generator=generator).topk(case.top_k, dim=-1).indices
    weights = torch.rand(case.tokens, case.top_k, generator=generator)
    dispatcher, copies = AllToAllDispatcher(case.experts, group), Copies()
    sent, routed = (_splits(counts) for counts in pairs_and_slots(ids, case.experts, RANKS))
    there, back = (tokens.new_zeros(sum(split), case.width) for split in routed)

    def ours() -> None:
        dispatcher.dispatch(tokens, ids, weights).mix(copies)

    def bare() -> None:
        send, receive = routed
        dist.all_to_all_single(back, there, receive, send)
        dist.all_to_all_single(there, back, send, receive)

    def bare_new(send: list[int], receive: list[int]) -> None:
        came = there.new_empty(sum(receive), case.width)
        dist.all_to_all_single(came, there[: sum(send)], receive, send)
        dist.all_to_all_single(there.new_empty(sum(send), case.width), came, send, receive)

    contenders = {
        "ours": ours,
        "routed": bare,
        "routed_new": lambda: bare_new(*routed),
        "sent_new": lambda: bare_new(*sent),
    }
    with torch.no_grad():
        return in_turn(contenders, rounds, warmup=2, ready=dist.barrier)


def _splits(send: torch.Tensor) -> tuple[list[int], list[int]]:
    """How many rows go to each rank, and come from it."""
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    return send.tolist(), receive.tolist()
