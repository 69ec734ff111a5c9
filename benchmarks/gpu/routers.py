"""Experts chosen in ways that load them differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.gpu.layer import Shape

ROUTERS = ("uniform", "zipf", "real")
"""Experts drawn evenly; so that loads fall as 1 / rank; by a random gate of random tokens."""


def expert_ids(router: str, shape: Shape, device: str) -> Tensor:
    """int64 [T, K], distinct within a token; the same at every call."""
    draw = torch.Generator().manual_seed(0)
    if router == "uniform":
        ids_TK = torch.rand(shape.T, shape.E, generator=draw).topk(shape.K).indices
    elif router == "zipf":
        ids_TK = by_shares(zipf_shares(shape.E, shape.K)[torch.randperm(shape.E, generator=draw)], shape.T, draw)
    else:
        raise ValueError(f"{router} is no router that draws experts")
    return ids_TK.to(device)


def zipf_shares(num_experts: int, top_k: int) -> Tensor:
    """float64 [E]: the share of tokens that have each expert, by rank. Falls as 1 / rank, but for the first ranks,
    whose experts every token has; sums to K."""
    shares = 1 / torch.arange(1, num_experts + 1, dtype=torch.float64)
    for full in range(num_experts):
        rest = shares[full:] * ((top_k - full) / shares[full:].sum())
        if rest[0] <= 1:
            return torch.cat([torch.ones(full, dtype=torch.float64), rest])
    raise ValueError(f"{top_k} experts a token of {num_experts}")


def by_shares(shares_E: Tensor, num_tokens: int, draw: torch.Generator) -> Tensor:
    """Systematic sampling: int64 [T, K] in which expert e is chosen by a share of ``shares_E[e]`` of the tokens.

    Shares laid end to end make a line of length K; each token takes the experts under K points one apart, from a random
    first one. No share is above 1, so none is taken twice.
    """
    ends_E = shares_E.cumsum(0)
    top_k = round(ends_E[-1].item())
    first_T1 = torch.rand(num_tokens, 1, generator=draw, dtype=torch.float64)
    points_TK = first_T1 + torch.arange(top_k, dtype=torch.float64)
    return torch.searchsorted(ends_E, points_TK, right=True).clamp_(max=len(shares_E) - 1)
