"""Choice of the keys that a query sees: DeepSeek Sparse Attention (DeepSeek-V3.2-Exp, section 2.1).

A few narrow heads score every key, and a query's best ``top_k`` remain. Where a sequence has no more keys than that,
attention is dense, and nothing here runs. DeepSeek trains these tensors by a loss of their own, from the attention of a
dense model; here they are buffers, which training leaves as they are. Scores are computed in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefoundry.config import IndexerConfig
from moefoundry.model.cache import LayerCache
from moefoundry.model.context import AttentionContext
from moefoundry.model.rope import rotate

NORM_EPS = 1e-6


class Indexer(nn.Module):
    """Scores of keys; H heads of width d, which share the keys.

    Args:
        cfg: Its sizes.
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
        self.top_k, self.n_heads = cfg.top_k, cfg.n_heads
        self.widths = [rope_width, cfg.head_dim - rope_width]
        self.register_buffer("q_proj", torch.zeros(cfg.n_heads * cfg.head_dim, query_rank))
        self.register_buffer("k_proj", torch.zeros(cfg.head_dim, d_model))
        self.register_buffer("k_norm_weight", torch.zeros(cfg.head_dim))
        self.register_buffer("k_norm_bias", torch.zeros(cfg.head_dim))
        self.register_buffer("head_proj", torch.zeros(cfg.n_heads, d_model))

    @torch.no_grad()
    def forward(
        self, x_BSD: Tensor, q_BSR: Tensor, context: AttentionContext, cache: LayerCache | None = None
    ) -> AttentionContext:
        """Leave the best keys of each query in the context.

        Args:
            x_BSD: Input of attention.
            q_BSR: Compressed queries after their norm.
            context: Positions and mask.
            cache: Keys of the tokens before these, to which these are added.
        """
        x_BSD, q_BSR = x_BSD.float(), q_BSR.float()
        k_BLd = self._keys(x_BSD, context)
        if cache is not None:
            (k_BLd,) = cache.append(k_BLd)
        length, seq_len = k_BLd.shape[1], x_BSD.shape[1]
        if length <= self.top_k:
            return context
        q_BHSd = F.linear(q_BSR, self.q_proj.float()).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        scores_BHSL = F.relu(self._rotated(q_BHSd, context) @ k_BLd.unsqueeze(1).mT) * k_BLd.shape[-1] ** -0.5
        weights_BSH = F.linear(x_BSD, self.head_proj.float()) * self.n_heads**-0.5
        scores_B1SL = (scores_BHSL * weights_BSH.mT.unsqueeze(-1)).sum(dim=1, keepdim=True)
        seen = context.mask
        if seen is None:
            seen = torch.ones(seq_len, length, dtype=torch.bool, device=x_BSD.device).tril(length - seq_len)
        best = scores_B1SL.masked_fill(~seen, -torch.inf).topk(self.top_k, dim=-1).indices
        chosen = torch.zeros_like(scores_B1SL, dtype=torch.bool).scatter(-1, best, True)
        return context._replace(mask=chosen & seen, is_causal=False)

    def _keys(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        k_BSd = F.linear(x_BSD, self.k_proj.float())
        weight, bias = self.k_norm_weight.float(), self.k_norm_bias.float()
        k_BSd = F.layer_norm(k_BSd, weight.shape, weight, bias, NORM_EPS)
        return self._rotated(k_BSd.unsqueeze(1), context).squeeze(1)

    def _rotated(self, x_BHSd: Tensor, context: AttentionContext) -> Tensor:
        turned, rest = x_BHSd.split(self.widths, dim=-1)
        return torch.cat([rotate(turned, context.rotation), rest], dim=-1)
