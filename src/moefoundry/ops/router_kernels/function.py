"""Functions over the kernels, with autograd. References: ``moe/router.py`` and ``moe/balance.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.router_kernels import kernels

TILE_ELEMENTS = 256
"""Logits that a warp has at a time. Up to as many experts, it has whole rows, and nothing waits for another warp."""
PROGRAMS = 2112
"""Programs of the forward pass, about: 16 for each of an H100's 132 multiprocessors. Each sums a part of the means.
Their number is the same on every device, and so is the order of the sums."""


class Choice(NamedTuple):
    """Kind of a router.

    Attributes:
        top_k: K.
        softmax: Scores are softmax over the experts; else each is a sigmoid.
        normalize: Divide the weights of a token by their sum.
        scale: Multiplies the weights then.
        segments: G; tokens are G segments of equally many.
        groups: Groups of equally many experts, one after the other; 1 does not limit the choice.
        top_k_groups: Groups that a token's experts are from.
        group_votes: A group is as good as the sum of this many of its best scores plus bias; 1 without a bias.
    """

    top_k: int
    softmax: bool
    normalize: bool
    scale: float
    segments: int
    groups: int = 1
    top_k_groups: int = 1
    group_votes: int = 1


class Routed(NamedTuple):
    """Results; those of G segments are means over the tokens of each.

    Attributes:
        scores_TE: fp32, differentiable.
        weights_TK: fp32, differentiable.
        ids_TK: int64, in descending order of score plus bias.
        probs_GE: Scores, normalized to sum to 1 over the experts; differentiable.
        z_loss_G: Squares of the logits' logsumexp; differentiable.
        entropy_G: Entropies of the normalized scores, in nats.
        counts_GE: int64, slots of each expert.
    """

    scores_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    probs_GE: Tensor
    z_loss_G: Tensor
    entropy_G: Tensor
    counts_GE: Tensor


def choose_experts(logits_TE: Tensor, bias_E: Tensor | None, choice: Choice) -> Routed:
    """Route T > 0 tokens.

    Args:
        logits_TE: fp32, at most ``MAX_EXPERTS`` experts.
        bias_E: fp32, added to the scores for the choice only.
        choice: Kind of the router; T is a multiple of its segments.
    """
    return Routed(*_Choose.apply(logits_TE, bias_E, choice))


def _tile(experts: int) -> dict[str, int]:
    width = triton.next_power_of_2(experts)
    return {"E": width, "ROWS": max(1, TILE_ELEMENTS // width), "num_warps": max(1, width // TILE_ELEMENTS)}


class _Choose(Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, choice: Choice) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        (tokens, experts), groups, top_k = logits_TE.shape, choice.segments, choice.top_k
        logits_TE, rows, tile = logits_TE.contiguous(), tokens // groups, _tile(experts)
        all_tiles = triton.cdiv(rows, tile["ROWS"])
        tiles = triton.cdiv(all_tiles, max(1, PROGRAMS // groups))  # of each program
        programs = triton.cdiv(all_tiles, tiles)
        scores_TE = torch.empty_like(logits_TE)
        weights_TK = logits_TE.new_empty(tokens, top_k)
        ids_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.int64)
        sums = logits_TE.new_empty(groups, programs, experts + 2)
        counts = logits_TE.new_empty(groups, programs, experts, dtype=torch.int32)
        kernels.route[(programs, groups)](
            logits_TE,
            bias_E,
            scores_TE,
            weights_TK,
            ids_TK,
            sums,
            counts,
            experts,
            rows,
            tiles,
            choice.scale,
            K=top_k,
            SOFTMAX=choice.softmax,
            NORMALIZE=choice.normalize,
            GROUPS=choice.groups,
            KEPT=choice.top_k_groups,
            VOTES=choice.group_votes,
            **tile,
        )
        means_G = sums.sum(1) / rows
        probs_GE, z_loss_G, entropy_G = means_G[:, :experts], means_G[:, experts], means_G[:, experts + 1]
        counts_GE = counts.sum(1)
        ctx.mark_non_differentiable(ids_TK, entropy_G, counts_GE)
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.choice = choice
        return scores_TE, weights_TK, ids_TK, probs_GE, z_loss_G, entropy_G, counts_GE

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_scores_TE: Tensor | None,
        grad_weights_TK: Tensor | None,
        _ids: None,
        grad_probs_GE: Tensor | None,
        grad_z_loss_G: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, None, None]:
        logits_TE, ids_TK = ctx.saved_tensors
        choice: Choice = ctx.choice
        grads = (grad_weights_TK, grad_scores_TE, grad_probs_GE, grad_z_loss_G)
        rows, experts = len(logits_TE) // choice.segments, logits_TE.shape[1]
        tile, grad_TE = _tile(experts), torch.empty_like(logits_TE)
        kernels.route_backward[(triton.cdiv(rows, tile["ROWS"]), choice.segments)](
            logits_TE,
            ids_TK,
            *(None if grad is None else grad.contiguous() for grad in grads),
            grad_TE,
            experts,
            rows,
            choice.scale,
            K=choice.top_k,
            SOFTMAX=choice.softmax,
            NORMALIZE=choice.normalize,
            **tile,
        )
        return grad_TE, None, None
