"""Dispatch and combine over ranks against two bare all-to-alls of the same bytes: what sorting and counting cost.

Both sides move the same rows with the same uneven splits, forward only; the bare ones move them as they lie. A rank
routes T tokens to K of E experts at random: T * K rows of D fp32 values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.harness import Comparison, in_turn
from benchmarks.ranks import on_ranks

RANKS, ROUNDS = 4, 15


class Case(NamedTuple):
    """Sizes of one rank."""

    tokens: int
    width: int
    experts: int
    top_k: int

    @property
    def mebibytes(self) -> float:
        return self.tokens * self.top_k * self.width * 4 / 2**20


CASES = (Case(1024, 1024, 16, 2), Case(1024, 1024, 64, 8), Case(4096, 1024, 64, 4))


def compare(quick: bool) -> list[Comparison]:
    """One comparison for each case."""
    return [_compare(case, 1 if quick else ROUNDS) for case in (CASES[:1] if quick else CASES)]


def _compare(case: Case, rounds: int) -> Comparison:
    seconds = on_ranks(_measure, RANKS, tuple(case), rounds)
    return Comparison(
        benchmark="dispatch + combine",
        case=f"T{case.tokens} D{case.width} E{case.experts} K{case.top_k}: {RANKS} ranks x {case.mebibytes:.0f} MiB",
        unit="s",
        peer="two all_to_all_single",
        ours=seconds["ours"],
        theirs=seconds["bare"],
        target=round(1 / 1.3, 2),
    )


def _measure(sizes: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    from moefoundry.moe.dispatch import AllToAllDispatcher, AllToAllMetadata

    case = Case(*sizes)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randn(case.tokens, case.width, generator=generator)
    ids = torch.rand(case.tokens, case.experts, generator=generator).topk(case.top_k, dim=-1).indices
    weights = torch.rand(case.tokens, case.top_k, generator=generator)
    dispatcher = AllToAllDispatcher(case.experts, dist.group.WORLD)
    rows, metadata = dispatcher.dispatch(tokens, ids, weights)()
    assert isinstance(metadata, AllToAllMetadata)
    splits = metadata.splits
    there, back = rows.new_empty(sum(splits.send), case.width), torch.empty_like(rows)

    def ours() -> None:
        dist.barrier()
        dispatcher.combine(*dispatcher.dispatch(tokens, ids, weights)())

    def bare() -> None:
        dist.barrier()
        dist.all_to_all_single(back, there, splits.receive, splits.send)
        dist.all_to_all_single(there, back, splits.send, splits.receive)

    with torch.no_grad():
        return in_turn({"ours": ours, "bare": bare}, rounds, warmup=2)
