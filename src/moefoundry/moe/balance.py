"""Losses that keep experts busy and logits small, as pure functions of one layer's routing.

Nothing is kept between calls: the values travel with the layer's output, so activation checkpointing neither loses them
nor counts them twice (MegaBlocks keeps a global list, which does both). Every loss is a mean over tokens, so weighting
micro-batches by their tokens gives the value of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.permute import count_by_expert


def balance_loss(scores_TE: Tensor, topk_expert_ids_TK: Tensor, num_segments: int) -> Tensor:
    """Load-balance loss, mean over segments of equally many consecutive tokens.

    For a segment of S tokens: ``sum_e f_e * P_e`` with ``f_e = E / (K * S) * (slots routed to e)`` and ``P_e`` the mean
    score of e (Switch Transformer, arXiv 2101.03961, eq. 4-6; by sequence: DeepSeek-V3, arXiv 2412.19437, eq. 17-20).
    1 is perfect balance. Scores are normalized to sum to 1 over E first (softmax scores already do).

    Args:
        scores_TE: [T, E], differentiable.
        topk_expert_ids_TK: int64 [T, K]; counted, not differentiated.
        num_segments: 1 takes the whole micro-batch as one segment; B takes each sequence as one.

    Raises:
        ValueError: T is not a multiple of ``num_segments``.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens % num_segments:
        raise ValueError(f"{num_tokens} tokens do not split into {num_segments} segments")
    probs_GSE = (scores_TE / scores_TE.sum(dim=-1, keepdim=True)).reshape(num_segments, -1, num_experts)
    ids_GN = topk_expert_ids_TK.reshape(num_segments, -1)
    segment_offset_G1 = torch.arange(num_segments, device=ids_GN.device).unsqueeze(1) * num_experts
    counts_GE = count_by_expert(ids_GN + segment_offset_G1, num_segments * num_experts).view(num_segments, num_experts)
    fraction_GE = counts_GE.to(scores_TE.dtype) * (num_experts / ids_GN.shape[1])
    return (fraction_GE * probs_GSE.mean(dim=1)).sum(dim=-1).mean()


def z_loss(router_logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)**2`` (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return router_logits_TE.logsumexp(dim=-1).square().mean()


def router_entropy(scores_TE: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the normalized scores, in nats; log(E) is uniform routing."""
    probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    return torch.special.entr(probs_TE).sum(dim=-1).mean()


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """Largest load over mean load, minus 1, along the last dim [..., E] -> [...] (arXiv 2408.15664, eq. 4)."""
    load = tokens_per_expert.to(torch.float64)
    return load.amax(dim=-1) / load.mean(dim=-1) - 1
