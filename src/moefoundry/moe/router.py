"""The router: choose each token's experts, and their weights.

Experts are chosen by their scores plus a bias that balances load, and weighted by their scores alone (DeepSeek-V3,
arXiv 2412.19437, eq. 12-16). ``docs/routing.md`` has the formula of every key. The gate is computed in fp32 in every
compute dtype (float64 stays float64): rounded logits would choose other experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from moefoundry.config import Assignment, MoEConfig, RouterConfig, UserError
from moefoundry.config.making import make_part
from moefoundry.moe.dealing import dealt_once
from moefoundry.ops.permute import count_by_expert
from moefoundry.ops.router_kernels import router_kernels
from moefoundry.ops.wide_linear import wide_linear, widened

TINY = 1e-20
"""Added to sums of scores, as in DeepSeek-V3's code, for sigmoid scores that all underflow; changes no other sum."""

Score = Callable[[Tensor], Tensor]
"""Router logits [T, E] -> scores [T, E], above 0, of the same dtype."""


class Picker(Protocol):
    """A score function that picks the experts, and weighs them, itself."""

    def pick(self, logits_TE: Tensor, top_k: int, training: bool) -> tuple[Tensor, Tensor]: ...


SCORE_KEY = "model.moe.router.score_function"


def softmax(cfg: RouterConfig) -> Score:
    """Make scores that sum to 1 over the experts."""
    return partial(torch.softmax, dim=-1)


def sigmoid(cfg: RouterConfig) -> Score:
    """Make scores of each expert by itself."""
    return torch.sigmoid


SOFTMAX_OR_NOT: dict[Any, bool] = {torch.softmax: True, torch.sigmoid: False}
"""Score functions that the fused kernel has."""


class RoutingMeans(NamedTuple):
    """Means over the tokens of each of G segments, from the kernel that routed them.

    Attributes:
        probs_GE: Scores, normalized to sum to 1 over the experts; differentiable.
        z_loss_G: Squares of the logits' logsumexp; differentiable.
        entropy_G: Entropies of the normalized scores, in nats.
        counts_GE: int64, slots of each expert: sums, not means.
    """

    probs_GE: Tensor
    z_loss_G: Tensor
    entropy_G: Tensor
    counts_GE: Tensor


class Routing(NamedTuple):
    """Decision of the router for T tokens.

    Attributes:
        router_logits: [T, E] fp32, before the score function.
        scores: [T, E] fp32, after it.
        topk_weights: [T, K] fp32, normalized and scaled as the recipe says.
        topk_expert_ids: int64 [T, K], distinct within a token, in descending order of score plus bias, or as picked. Of
            equal ones PyTorch's operators take any, and the fused kernel the first.
        means: For the statistics; None where they are left to be computed from the rest.
        tokens: [T, D], the tokens again, for all that comes behind the router, where the gate's product adds the
            gradient that they have from there to its own; None is the tokens as they came.
    """

    router_logits: Tensor
    scores: Tensor
    topk_weights: Tensor
    topk_expert_ids: Tensor
    means: RoutingMeans | None = None
    tokens: Tensor | None = None


class Router(nn.Module):
    """Linear gate, scores, top-k.

    Attributes:
        score: Score function, router logits -> scores.
        product: Product of the gate, [T, D] x [E, D] -> [T, E] and the tokens again, see
            :func:`~moefoundry.ops.wide_linear.wide_linear`; a precision policy may set one that keeps less for the
            backward pass.
        picks: The score function picks the experts itself.
        expert_bias: fp32 [E], a buffer without gradient, added to the scores for the choice of experts only; None if
            scores are softmax and ``bias_update_rate`` is 0.
    """

    expert_bias: Tensor | None

    def __init__(self, d_model: int, cfg: MoEConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, cfg.num_experts, bias=cfg.router.gate_bias)
        self.product = wide_linear
        self.top_k = cfg.top_k
        self.cfg, self.group_votes = cfg.router, cfg.group_votes
        self.score: Score = make_part("router_scores", cfg.router.score_function, SCORE_KEY, cfg.router)
        self.picks = hasattr(self.score, "pick") and cfg.router.assignment == Assignment.scores
        bias = torch.zeros(cfg.num_experts, dtype=torch.float32) if cfg.has_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, tokens_TD: Tensor, num_segments: int = 1) -> Routing:
        """Route [T, D] tokens.

        Args:
            tokens_TD: The tokens.
            num_segments: Segments of equally many tokens that means are taken over, if they are.

        Raises:
            UserError: The score function does not give a score of the logits' dtype for each of them.
        """
        seen_TD = tokens_TD
        if self.training and self.cfg.input_jitter:
            jitter, seen_TD = self.cfg.input_jitter, widened(tokens_TD)
            seen_TD = seen_TD * torch.empty_like(seen_TD).uniform_(1 - jitter, 1 + jitter)
        logits_TE, again_TD = self.product(seen_TD, self.gate.weight)
        behind_TD = again_TD if seen_TD is tokens_TD and again_TD is not tokens_TD else None
        if self.gate.bias is not None:
            logits_TE = logits_TE + self.gate.bias.to(logits_TE.dtype)
        if (routed := self._routed_by_kernel(logits_TE, num_segments)) is not None:
            return routed._replace(tokens=behind_TD)
        scores_TE = self.score(logits_TE)
        if scores_TE.shape != logits_TE.shape or scores_TE.dtype != logits_TE.dtype:
            given, wanted = (f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (scores_TE, logits_TE))
            raise UserError(f"{SCORE_KEY}: {self.cfg.score_function} gives scores {given} for logits {wanted}")
        if self.picks:
            weights_TK, expert_ids_TK = cast(Picker, self.score).pick(logits_TE, self.top_k, self.training)
        else:
            expert_ids_TK = self._choose(scores_TE.detach())
            weights_TK = scores_TE.gather(1, expert_ids_TK)
        if self.cfg.normalize_topk:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
        return Routing(logits_TE, scores_TE, weights_TK * self.cfg.scale, expert_ids_TK, None, behind_TD)

    def _routed_by_kernel(self, logits_TE: Tensor, num_segments: int) -> Routing | None:
        """Route by the fused kernel, if it is chosen and can."""
        if self.cfg.assignment != Assignment.scores or (kernels := router_kernels(logits_TE)) is None:
            return None
        if (is_softmax := SOFTMAX_OR_NOT.get(getattr(self.score, "func", self.score))) is None:
            return None
        cfg = self.cfg
        groups = cfg.num_groups, cfg.top_k_groups, self.group_votes
        choice = kernels.Choice(self.top_k, is_softmax, cfg.normalize_topk, cfg.scale, num_segments, *groups)
        scores_TE, weights_TK, ids_TK, *means = kernels.choose_experts(logits_TE, self.expert_bias, choice)
        return Routing(logits_TE, scores_TE, weights_TK, ids_TK, RoutingMeans(*means))

    def _choose(self, scores_TE: Tensor) -> Tensor:
        """Choose the experts of each token, int64 [T, K]."""
        if self.cfg.assignment == Assignment.uniform:
            return deal_in_turn(len(scores_TE), self.top_k, scores_TE.shape[1], self.cfg, scores_TE.device)
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias
        if self.cfg.num_groups > 1:
            scores_TE = keep_best_groups(scores_TE, self.cfg.num_groups, self.cfg.top_k_groups, self.group_votes)
        return scores_TE.topk(self.top_k, dim=-1).indices


def keep_best_groups(scores_TE: Tensor, num_groups: int, top_k_groups: int, best: int) -> Tensor:
    """Set the scores of experts outside each token's best groups to -inf (group-limited routing).

    Args:
        scores_TE: [T, E], scores plus bias; a group is E / G consecutive experts.
        num_groups: G.
        top_k_groups: Groups kept for each token.
        best: A group's score is the sum of this many of its largest scores: 1 in DeepSeek-V2 (arXiv 2405.04434,
            section 2.2.2), 2 in DeepSeek-V3. DeepSeek's inference code takes 2 if there is a bias.
    """
    scores_TGM = scores_TE.unflatten(1, (num_groups, -1))
    group_ids = scores_TGM.topk(best, dim=-1).values.sum(dim=-1).topk(top_k_groups, dim=-1).indices
    left_out_TG = torch.ones(scores_TGM.shape[:2], dtype=torch.bool, device=scores_TE.device)
    left_out_TG = left_out_TG.scatter(1, group_ids, False)
    return scores_TGM.masked_fill(left_out_TG.unsqueeze(-1), -math.inf).flatten(1)


def deal_in_turn(num_tokens: int, top_k: int, num_experts: int, cfg: RouterConfig, device: torch.device) -> Tensor:
    """Assign experts in turn whatever the scores, for benchmarks; int64 [T, K].

    All experts have equal load after every ``E / gcd(E / G, K)`` tokens. A token's experts come from ``top_k_groups``
    of the G groups, equally many from each if that divides K. The order of groups, and of the experts in each, is a
    fixed shuffle, so that a token's experts are on about as many nodes and ranks as a router's would be. Without
    groups, slot ``n = t * K + k`` goes to expert number ``n % E`` of the shuffle.
    """
    dealt_PK = _constant(top_k, num_experts, cfg.num_groups, cfg.top_k_groups, device)
    return dealt_PK[torch.arange(num_tokens, device=device) % len(dealt_PK)]


@cache
def _dealt_once(top_k: int, num_experts: int, num_groups: int, top_k_groups: int, device: torch.device) -> Tensor:
    """Give :func:`~moefoundry.moe.dealing.dealt_once` on a device, int64 [P, K]."""
    return torch.tensor(dealt_once(top_k, num_experts, num_groups, top_k_groups), device=device)


@torch.compiler.assume_constant_result
def _constant(*sizes_and_device: Any) -> Tensor:
    """Call :func:`_dealt_once`, which shuffles; the compiler cannot trace that."""
    return _dealt_once(*sizes_and_device)


def within_capacity(scores_TE: Tensor, topk_expert_ids_TK: Tensor, capacity_factor: float) -> Tensor:
    """Mark the slots that fit the capacity of their experts, bool [T, K].

    An expert takes at most ``ceil(capacity_factor * T * K / E)`` of the slots routed to it (GShard, arXiv 2006.16668),
    best scores first (not in order of position); of equal scores, those of the first tokens.

    Args:
        scores_TE: [T, E] scores of the T tokens that share the capacity.
        topk_expert_ids_TK: int64 [T, K].
        capacity_factor: Capacity of an expert as a multiple of its even share.
    """
    num_experts, num_slots = scores_TE.shape[1], topk_expert_ids_TK.numel()
    capacity = math.ceil(min(capacity_factor * num_slots / num_experts, num_slots))
    by_score_N = scores_TE.gather(1, topk_expert_ids_TK).flatten().argsort(descending=True, stable=True)
    ids_N = topk_expert_ids_TK.flatten()[by_score_N]
    by_expert_N = ids_N.argsort(stable=True)
    counts_E = count_by_expert(ids_N, num_experts)
    first_of_expert_E = counts_E.cumsum(0) - counts_E
    place_N = torch.arange(num_slots, device=ids_N.device) - first_of_expert_E[ids_N[by_expert_N]]
    kept_N = torch.empty_like(place_N, dtype=torch.bool)
    kept_N[by_score_N[by_expert_N]] = place_N < capacity
    return kept_N.view_as(topk_expert_ids_TK)
