"""Load balancing and router z-loss as pure functions of one layer's routing.

Losses are returned with the layer's output. None is kept in a global list, as in MegaBlocks, where activation
checkpointing loses losses or counts them twice. Every loss is a mean over tokens, so that micro-batches weighted by
their tokens give the value of the whole batch; the mean of no tokens is 0, with gradients of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.moe.router import TINY, Routing
from moefoundry.ops.permute import count_by_expert


class Statistics(NamedTuple):
    """Statistics of one layer's routing: ``RoutingStats`` has the same, by the same names."""

    balance_loss: Tensor
    z_loss: Tensor
    mean_probs: Tensor
    tokens_per_expert: Tensor
    router_entropy: Tensor


def statistics(routing: Routing, num_segments: int, segment_of_token_T: Tensor | None) -> Statistics:
    """Compute the statistics of a routing, from its means if it has any.

    Args:
        routing: Of T tokens. Its means are over as many segments, or over one if ``segment_of_token_T`` is given.
        num_segments: Segments that the balance loss takes its means over.
        segment_of_token_T: As of :func:`balance_loss`.
    """
    scores_TE, expert_ids_TK, means = routing.scores, routing.topk_expert_ids, routing.means
    if means is None:
        return Statistics(
            balance_loss(scores_TE, expert_ids_TK, num_segments, segment_of_token_T),
            z_loss(routing.router_logits),
            mean_probs(scores_TE),
            count_by_expert(expert_ids_TK, scores_TE.shape[1]),
            router_entropy(scores_TE.detach()),
        )
    if segment_of_token_T is None:
        balance = balance_loss_of_means(means.probs_GE, means.counts_GE)
    else:
        balance = balance_loss(scores_TE, expert_ids_TK, num_segments, segment_of_token_T)
    of_logits, probs_E, entropy = (_over_segments(x) for x in (means.z_loss_G, means.probs_GE, means.entropy_G))
    return Statistics(balance, of_logits, probs_E, means.counts_GE.sum(0), entropy)


def _over_segments(means: Tensor) -> Tensor:
    """Average over the segments; of one, launch nothing."""
    return means.squeeze(0) if len(means) == 1 else means.mean(0)


def balance_loss(
    scores_TE: Tensor, topk_expert_ids_TK: Tensor, num_segments: int, segment_of_token_T: Tensor | None = None
) -> Tensor:
    """Compute the load-balance loss, a mean over segments, each weighted by its tokens.

    For a segment of S tokens: ``sum_e f_e * P_e`` with ``f_e = E / (K * S) * (slots routed to e)`` and ``P_e`` the mean
    score of e (Switch Transformer, arXiv 2101.03961, eq. 4-6; by sequence: DeepSeek-V3, arXiv 2412.19437, eq. 17-20).
    1 is perfect balance. Scores are normalized to sum to 1 over E first (softmax scores already do).

    Args:
        scores_TE: [T, E], differentiable.
        topk_expert_ids_TK: int64 [T, K]; counted, not differentiated.
        num_segments: G; 1 takes the whole micro-batch as one segment, B takes each sequence as one; 0 if there are no
            tokens.
        segment_of_token_T: int64 [T] in [0, G); None is segments of equally many consecutive tokens.

    Raises:
        ValueError: Segments are to be equally long, and T is not a multiple of ``num_segments``.
    """
    num_tokens, num_experts = scores_TE.shape
    if not num_tokens:
        return scores_TE.sum()
    if segment_of_token_T is not None:
        ids_TK = topk_expert_ids_TK + segment_of_token_T.unsqueeze(1) * num_experts
        counts_GE = count_by_expert(ids_TK, num_segments * num_experts).view(num_segments, num_experts)
        load_TE = _relative_load(counts_GE, scores_TE.dtype).index_select(0, segment_of_token_T)
        return mean_over_tokens((load_TE * normalized(scores_TE)).sum(dim=-1))
    if num_tokens % max(num_segments, 1):
        raise ValueError(f"{num_tokens} tokens do not split into {num_segments} segments")
    probs_GSE = normalized(scores_TE).reshape(num_segments, -1, num_experts)
    ids_GN = topk_expert_ids_TK.reshape(num_segments, -1)
    segment_offset_G1 = torch.arange(num_segments, device=ids_GN.device).unsqueeze(1) * num_experts
    counts_GE = count_by_expert(ids_GN + segment_offset_G1, num_segments * num_experts).view(num_segments, num_experts)
    return balance_loss_of_means(probs_GSE.mean(dim=1), counts_GE)


def balance_loss_of_means(mean_probs_GE: Tensor, counts_GE: Tensor) -> Tensor:
    """Compute :func:`balance_loss` from means and counts of G segments.

    Args:
        mean_probs_GE: [G, E] mean normalized scores, differentiable.
        counts_GE: int64 [G, E], slots of each expert; may count more tokens than the means are taken over.
    """
    return (_relative_load(counts_GE, mean_probs_GE.dtype) * mean_probs_GE).sum(dim=-1).mean()


def _relative_load(counts_GE: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide each expert's slots by the mean over experts, [G, E]: ``f_e`` of :func:`balance_loss`."""
    slots_G1 = counts_GE.sum(dim=-1, keepdim=True).clamp(min=1)
    return counts_GE.to(dtype) * counts_GE.shape[-1] / slots_G1


def mean_probs(scores_TE: Tensor) -> Tensor:
    """Average over tokens the scores, normalized to sum to 1 over E; [E]."""
    return mean_over_tokens(normalized(scores_TE))


def mean_over_tokens(values_T: Tensor) -> Tensor:
    """Average over the first dim; 0, with gradients of 0, if it is empty."""
    return values_T.mean(dim=0) if len(values_T) else values_T.sum(dim=0)


def normalized(scores_TE: Tensor) -> Tensor:
    """Divide scores [T, E] by their sum over E."""
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + TINY)


class StepCounts:
    """Slots of each expert in the optimizer step so far, for ``aux_loss_scope: global_batch`` (arXiv 2501.11873).

    The counts of a micro-batch are summed over all ranks before use. Micro-batch i of a step sees the counts of
    micro-batches 1 to i, since later ones are not routed yet; with one micro-batch a step, the loss is exactly that of
    the global batch.

    Args:
        group: Ranks whose tokens make up the global batch; None for one process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._total: Tensor | None = None

    def begin_step(self) -> None:
        """Forget the counts of the last step."""
        self._total = None

    def add(self, counts_LE: Tensor) -> Tensor:
        """Add a micro-batch's slots [L, E] of every rank; return the total so far, [L, E]."""
        counts_LE = counts_LE.clone()
        if self.group is not None:
            dist.all_reduce(counts_LE, group=self.group)
        self._total = counts_LE if self._total is None else self._total + counts_LE
        return self._total


def z_loss(router_logits_TE: Tensor) -> Tensor:
    """Average ``logsumexp(logits)**2`` over tokens (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return mean_over_tokens(router_logits_TE.logsumexp(dim=-1).square())


def router_entropy(scores_TE: Tensor) -> Tensor:
    """Average the entropy of the normalized scores over tokens, in nats; log(E) is uniform routing."""
    return mean_over_tokens(torch.special.entr(normalized(scores_TE)).sum(dim=-1))


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """Compute largest load / mean load - 1 along the last dim, [..., E] -> [...] (arXiv 2408.15664, eq. 4).

    It is 0 where no expert has a load.
    """
    load = tokens_per_expert.to(torch.float64)
    violation = load.amax(dim=-1) / load.mean(dim=-1) - 1
    return violation.where(load.amax(dim=-1) > 0, 0.0)


def expert_bias_step(tokens_per_expert: Tensor, rate: float) -> Tensor:
    """Compute the change of the expert biases after an optimizer step, fp32 [..., E]: ``rate * sign(mean - load)``.

    Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1). It compares integers, so all ranks and meshes agree.

    Args:
        tokens_per_expert: int64 [..., E] slots of each expert in the whole step.
        rate: ``bias_update_rate``.
    """
    total = tokens_per_expert.sum(dim=-1, keepdim=True)
    return rate * (total - tokens_per_expert * tokens_per_expert.shape[-1]).sign().float()
