"""Choice of the keys that a query sees: DeepSeek Sparse Attention (DeepSeek-V3.2-Exp, section 2.1).

A few narrow heads score every key, and a query's best ``top_k`` remain. Where a sequence has no more keys than that,
attention is dense. Scores are computed in fp32.

The choice has no gradient. The scores learn from a loss of their own: the divergence of their softmax from the mean
distribution of the heads of attention, which is constant here. So are the inputs of the scores, and nothing else learns
from this loss. ``stage`` says what trains:

    frozen    none of the scores' tensors, which are buffers
    warm_up   they alone, on all keys that a query sees; in training attention is dense
    sparse    everything; they learn on the chosen keys
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moefoundry.config import IndexerConfig, IndexerStage
from moefoundry.model.cache import LayerCache
from moefoundry.model.context import AttentionContext
from moefoundry.model.rope import rotate
from moefoundry.ops.sizes import INDEXER_QUERIES

NORM_EPS = 1e-6


class Scores(NamedTuple):
    """Factors of the scores of L keys for S queries, fp32 or wider.

    Attributes:
        q_BHSd: Queries of the H heads.
        k_BLd: Keys, which the heads share.
        weights_BSH: Weights of the heads.
    """

    q_BHSd: Tensor
    k_BLd: Tensor
    weights_BSH: Tensor

    def of(self, queries: slice) -> Tensor:
        """Compute the scores of some of the queries, [B, queries, L]."""
        q_BHSd, weights_BSH = self.q_BHSd[:, :, queries], self.weights_BSH[:, queries]
        scores_BHSL = F.relu(q_BHSd @ self.k_BLd.unsqueeze(1).mT) * self.k_BLd.shape[-1] ** -0.5
        return (scores_BHSL * weights_BSH.mT.unsqueeze(-1)).sum(dim=1)


class Indexer(nn.Module):
    """Scores of keys; H heads of width d, which share the keys.

    Args:
        cfg: Its sizes, and what trains.
        d_model: D.
        query_rank: R, width of the compressed queries.
        rope_width: Width of the part of a head, from its beginning, that has a position.
    """

    q_proj: Tensor
    k_proj: Tensor
    k_norm_weight: Tensor
    k_norm_bias: Tensor
    head_proj: Tensor

    def __init__(self, cfg: IndexerConfig, d_model: int, query_rank: int, rope_width: int) -> None:
        super().__init__()
        self.top_k, self.n_heads, self.stage = cfg.top_k, cfg.n_heads, cfg.stage
        self.widths = [rope_width, cfg.head_dim - rope_width]
        self._hold("q_proj", cfg.n_heads * cfg.head_dim, query_rank)
        self._hold("k_proj", cfg.head_dim, d_model)
        self._hold("k_norm_weight", cfg.head_dim)
        self._hold("k_norm_bias", cfg.head_dim)
        self._hold("head_proj", cfg.n_heads, d_model)

    def _hold(self, name: str, *shape: int) -> None:
        if self.stage == IndexerStage.frozen:
            self.register_buffer(name, torch.zeros(shape))
        else:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @property
    def learns(self) -> bool:
        """True in training, where its tensors train."""
        return self.training and self.stage != IndexerStage.frozen

    def forward(
        self, x_BSD: Tensor, q_BSR: Tensor, context: AttentionContext, cache: LayerCache | None = None
    ) -> tuple[AttentionContext, Scores | None]:
        """Leave the best keys of each query in the context.

        Args:
            x_BSD: Input of attention, without gradient.
            q_BSR: Compressed queries after their norm, without gradient.
            context: Positions and mask.
            cache: Keys of the tokens before these, to which these are added.

        Returns:
            The context, and the scores where they learn.
        """
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            scores = self._scores(_wide(x_BSD), _wide(q_BSR), context)
        if cache is not None:
            (k_BLd,) = cache.append(scores.k_BLd)
            scores = scores._replace(k_BLd=k_BLd)
        dense = scores.k_BLd.shape[1] <= self.top_k or (self.learns and self.stage == IndexerStage.warm_up)
        chosen = context if dense else self._chosen(scores, context)
        return chosen, scores if self.learns else None

    @torch.no_grad()
    def _chosen(self, scores: Scores, context: AttentionContext) -> AttentionContext:
        scores_B1SL = scores.of(slice(None)).unsqueeze(1)
        seen = _seen(context.mask, slice(None), scores_B1SL.shape[2], scores_B1SL.shape[3], scores_B1SL.device)
        best = scores_B1SL.masked_fill(~seen, -torch.inf).topk(self.top_k, dim=-1).indices
        chosen = torch.zeros_like(scores_B1SL, dtype=torch.bool).scatter(-1, best, True)
        return context._replace(mask=chosen & seen, is_causal=False)

    def _scores(self, x_BSD: Tensor, q_BSR: Tensor, context: AttentionContext) -> Scores:
        q_BHSd = F.linear(q_BSR, self.q_proj.to(x_BSD.dtype)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        weights_BSH = F.linear(x_BSD, self.head_proj.to(x_BSD.dtype)) * self.n_heads**-0.5
        return Scores(self._rotated(q_BHSd, context), self._keys(x_BSD, context), weights_BSH)

    def _keys(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        k_BSd = F.linear(x_BSD, self.k_proj.to(x_BSD.dtype))
        weight, bias = self.k_norm_weight.to(x_BSD.dtype), self.k_norm_bias.to(x_BSD.dtype)
        k_BSd = F.layer_norm(k_BSd, weight.shape, weight, bias, NORM_EPS)
        return self._rotated(k_BSd.unsqueeze(1), context).squeeze(1)

    def _rotated(self, x_BHSd: Tensor, context: AttentionContext) -> Tensor:
        turned, rest = x_BHSd.split(self.widths, dim=-1)
        return torch.cat([rotate(turned, context.rotation), rest], dim=-1)


def train_indexers_alone(model: nn.Module) -> None:
    """Freeze every parameter that is not of an indexer."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Indexer):
            module.requires_grad_(True)


@torch.compiler.disable  # it checkpoints
def divergence(
    scores: Scores,
    q_BHSd: Tensor,
    k_BHLd: Tensor,
    context: AttentionContext,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Compute the KL divergence of the scores' softmax from the heads' distribution over the keys that are seen.

    The heads' is the sum of their attention probabilities, divided by its own sum (section 2.1.1, equations 3 and 4).
    Some queries' probabilities are in memory at a time, and are computed again in the backward pass.

    Args:
        scores: Scores, differentiable.
        q_BHSd: Queries of attention; these and the next have no gradient from here.
        k_BHLd: Keys of attention, as many heads as queries.
        context: Tells which keys a query sees.
        scale: Factor of their products.
        sinks_H: Logits of heads that no key has, as in attention.

    Returns:
        [B, S], nats, fp32 or wider.
    """
    # tensors are arguments: what the function itself held would stay also where the whole block is recomputed
    tensors = *scores, q_BHSd.detach(), k_BHLd.detach(), context.mask, sinks_H
    length = q_BHSd.shape[2]
    firsts = range(0, length, INDEXER_QUERIES)
    parts = [slice(first, min(first + INDEXER_QUERIES, length)) for first in firsts]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_divergence_of, part, scale, *tensors, **options) for part in parts], dim=1)


def _divergence_of(
    queries: slice,
    scale: float,
    score_q_BHSd: Tensor,
    score_k_BLd: Tensor,
    weights_BSH: Tensor,
    q_BHSd: Tensor,
    k_BHLd: Tensor,
    mask: Tensor | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Compute the divergence of some of the queries, [B, queries]."""
    seen = _seen(mask, queries, q_BHSd.shape[2], k_BHLd.shape[2], q_BHSd.device)
    p_BSL = _mean_probabilities(q_BHSd[:, :, queries], k_BHLd, seen, scale, sinks_H)
    seen, scores_BSL = seen.squeeze(1), Scores(score_q_BHSd, score_k_BLd, weights_BSH).of(queries)
    log_q_BSL = scores_BSL.masked_fill(~seen, -torch.inf).log_softmax(dim=-1)
    return (torch.xlogy(p_BSL, p_BSL) - p_BSL * log_q_BSL.masked_fill(~seen, 0.0)).sum(dim=-1)


@torch.no_grad()
def _mean_probabilities(q_BHSd: Tensor, k_BHLd: Tensor, seen: Tensor, scale: float, sinks_H: Tensor | None) -> Tensor:
    """Average the attention probabilities of the heads, [B, S, L]; each row sums to 1."""
    logits_BHSL = (_wide(q_BHSd) @ _wide(k_BHLd).mT * scale).masked_fill(~seen, -torch.inf)
    if sinks_H is not None:
        sinks = _wide(sinks_H).view(1, -1, 1, 1).expand(*logits_BHSL.shape[:3], 1)
        logits_BHSL = torch.cat([logits_BHSL, sinks], dim=-1)
    sums_BSL = logits_BHSL.softmax(dim=-1).sum(dim=1)[..., : k_BHLd.shape[2]]
    return sums_BSL / sums_BSL.sum(dim=-1, keepdim=True)


def _seen(mask: Tensor | None, queries: slice, num_queries: int, length: int, device: torch.device) -> Tensor:
    """Tell which keys some of the queries see, bool [1 or B, 1, queries, L]."""
    if mask is None:
        mask = torch.ones(num_queries, length, dtype=torch.bool, device=device).tril(length - num_queries)
    return mask[..., queries, :].view(-1, 1, *mask[..., queries, :].shape[-2:])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
