"""Dispatch over ranks brings every row to its expert and back, whatever the routing."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed

TOKENS, WIDTH, EXPERTS, TOP_K = 12, 6, 8, 2
ROUTINGS = ["random", "all_to_one_rank", "one_rank_receives_none", "uneven_tokens", "no_tokens_on_rank_0"]


class Result(NamedTuple):
    """What a rank's tokens became, and the gradients of its tokens and weights."""

    out: Tensor
    grad_tokens: Tensor
    grad_weights: Tensor
    received: int


def case(routing: str, rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, D], expert ids [T, K] and weights [T, K] of one rank, float64."""
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
    return tokens.requires_grad_(), ids, weights.requires_grad_()


def expert(rows: Tensor, index: int) -> Tensor:
    """A stand-in for an expert: each does something else, and none is linear."""
    return torch.sin(rows * (index + 1)) + index


def dispatch_and_combine(dispatcher: object, routing: str, rank: int, ranks: int, first_expert: int) -> Result:
    tokens, ids, weights = case(routing, rank, ranks)
    rows, metadata = dispatcher.dispatch(tokens, ids)
    groups = rows.split(metadata.tokens_per_local_expert.tolist())
    rows = torch.cat([expert(group, first_expert + i) for i, group in enumerate(groups)])
    out = dispatcher.combine(rows, weights, metadata)
    (out * torch.arange(1.0, WIDTH + 1)).sum().backward()
    return Result(out.detach(), tokens.grad, weights.grad, len(rows))


def on_ranks(routing: str) -> Result:
    import torch.distributed as dist

    from moefoundry.moe.dispatch import AllToAllDispatcher

    rank, ranks = dist.get_rank(), dist.get_world_size()
    dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD)
    return dispatch_and_combine(dispatcher, routing, rank, ranks, rank * EXPERTS // ranks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_row17_experts_on_ranks_equal_experts_on_one(routing: str, ranks: int) -> None:
    from moefoundry.moe.dispatch import LocalDispatcher

    results = run_distributed(on_ranks, ranks, routing)
    for rank, result in enumerate(results):
        expected = dispatch_and_combine(LocalDispatcher(EXPERTS), routing, rank, ranks, 0)
        for name in ("out", "grad_tokens", "grad_weights"):
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    received = [result.received for result in results]
    assert sum(received) == sum(len(case(routing, rank, ranks)[0]) for rank in range(ranks)) * TOP_K
    if routing == "all_to_one_rank":
        assert received[:-1] == [0] * (ranks - 1)
    if routing == "one_rank_receives_none":
        assert received[0] == 0


def undivided_experts() -> None:
    import torch.distributed as dist

    from moefoundry.moe.dispatch import AllToAllDispatcher

    AllToAllDispatcher(3, dist.group.WORLD)


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 experts do not divide among 2 ranks"):
        run_distributed(undivided_experts, 2)
