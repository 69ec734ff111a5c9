"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

Keys and values of all heads are computed from one narrow vector a token. A cache keeps only that vector, and the part
of the key that has the position, which all heads share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moefoundry.config import MlaConfig, ModelConfig
from moefoundry.model.attention import Attention
from moefoundry.model.cache import LayerCache
from moefoundry.model.context import AttentionContext, attend
from moefoundry.model.indexer import Indexer, Scores, divergence
from moefoundry.model.norm import RMSNorm
from moefoundry.model.rope import rotate_interleaved, yarn_mscale
from moefoundry.ops.recompute import ATTENTION_OPS, keeping

LATENT_NORM_EPS = 1e-6  # DeepSeek's, whatever the eps of a block's norms


class MultiHeadLatentAttention(Attention):
    """Causal attention over compressed keys and values; weights as DeepSeek publishes them, RoPE interleaved.

    N, P and V are the widths ``qk_nope_head_dim``, ``qk_rope_head_dim`` and ``v_head_dim``. R is ``kv_lora_rank``; for
    queries it is ``q_lora_rank``, or D if that is null.
    With ``recompute_up_projections`` the backward pass computes queries, keys and values of all heads again instead of
    keeping them; attention itself runs once (DeepSeek-V3, section 3.2.3).
    """

    def __init__(self, cfg: MlaConfig, model: ModelConfig) -> None:
        super().__init__()
        d_model = model.d_model
        self.n_heads = cfg.n_heads
        self.qk_widths = [cfg.qk_nope_head_dim, cfg.qk_rope_head_dim]
        self.kv_a_widths = [cfg.kv_lora_rank, cfg.qk_rope_head_dim]
        self.kv_b_widths = [cfg.qk_nope_head_dim, cfg.v_head_dim]
        self.q_lora_rank = cfg.q_lora_rank
        if cfg.q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, cfg.n_heads * sum(self.qk_widths), bias=False)
        else:
            self.q_a_proj = nn.Linear(d_model, cfg.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(cfg.q_lora_rank, LATENT_NORM_EPS, model.norm.zero_centered)
            self.q_b_proj = nn.Linear(cfg.q_lora_rank, cfg.n_heads * sum(self.qk_widths), bias=False)
        self.indexer: Indexer | None = None
        if cfg.indexer is not None and cfg.q_lora_rank is not None:
            self.indexer = Indexer(cfg.indexer, d_model, cfg.q_lora_rank, cfg.qk_rope_head_dim)
        self.kv_a_proj = nn.Linear(d_model, sum(self.kv_a_widths), bias=False)
        self.kv_a_norm = RMSNorm(cfg.kv_lora_rank, LATENT_NORM_EPS, model.norm.zero_centered)
        self.kv_b_proj = nn.Linear(cfg.kv_lora_rank, cfg.n_heads * sum(self.kv_b_widths), bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.v_head_dim, d_model, bias=False)
        self.sinks = nn.Parameter(torch.empty(cfg.n_heads)) if cfg.sinks else None
        self.scale = softmax_scale(cfg)

    def forward(
        self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S, D] -> [B, S, D]; where an indexer learns, the divergence of its choice [B, S], too."""
        q_BSR = x_BSD if self.q_lora_rank is None else self.q_a_proj(x_BSD)
        context, scores = self._choose_keys(x_BSD, q_BSR, context, cache)
        latent_BSR, k_rope_BSP = self.kv_a_proj(x_BSD).split(self.kv_a_widths, dim=-1)
        inputs = q_BSR, latent_BSR, k_rope_BSP, context
        if not self.recompute_up_projections or cache is not None:
            heads, learned = self._attend(*inputs, cache, scores)
        else:
            heads, learned = self._attend_twice(*inputs, None, scores)
        out_BSD = self.o_proj(heads)
        return out_BSD if learned is None else (out_BSD, learned)

    def _choose_keys(
        self, x_BSD: Tensor, q_BSR: Tensor, context: AttentionContext, cache: LayerCache | None
    ) -> tuple[AttentionContext, Scores | None]:
        """Leave the keys in the context that queries are to see; give their scores where these learn."""
        indexer = self.indexer
        if indexer is None or (cache is None and not indexer.learns and x_BSD.shape[1] <= indexer.top_k):
            return context, None
        with torch.no_grad():
            narrow_BSR = self.q_a_norm(q_BSR)
        chosen: tuple[AttentionContext, Scores | None] = indexer(
            x_BSD.detach(), narrow_BSR, context, None if cache is None else cache.beside
        )
        return chosen

    @torch.compiler.disable  # it cannot trace selective checkpointing
    def _attend_twice(self, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Run :meth:`_attend` without a cache; the backward pass runs it again, except attention itself."""
        options: dict[str, Any] = {"use_reentrant": False}  # the state of random numbers is kept: adapters draw some
        return checkpoint(self._attend, *inputs, context_fn=keeping(ATTENTION_OPS), **options)

    def _attend(
        self,
        q_BSR: Tensor,
        latent_BSR: Tensor,
        k_rope_BSP: Tensor,
        context: AttentionContext,
        cache: LayerCache | None,
        scores: Scores | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the heads' outputs, [B, S, H * V], from the narrow vectors, and what scores learn from."""
        q_nope_BHSN, q_rope_BHSP = self._heads(self._queries(q_BSR)).split(self.qk_widths, dim=-1)
        latent_BLR = self.kv_a_norm(latent_BSR)
        k_rope_B1LP = rotate_interleaved(k_rope_BSP.unsqueeze(1), context.rotation)
        if cache is not None:
            latent_BLR, k_rope_B1LP = cache.append(latent_BLR, k_rope_B1LP)
        k_nope_BHLN, v_BHLV = self._heads(self.kv_b_proj(latent_BLR)).split(self.kv_b_widths, dim=-1)
        q_BHSd = torch.cat([q_nope_BHSN, rotate_interleaved(q_rope_BHSP, context.rotation)], dim=-1)
        k_BHLd = torch.cat([k_nope_BHLN, k_rope_B1LP.expand(-1, self.n_heads, -1, -1)], dim=-1)
        out = attend(q_BHSd, k_BHLd, v_BHLV, context, self.scale, self.sinks)
        if scores is None:
            return out, None
        return out, divergence(scores, q_BHSd, k_BHLd, context, self.scale, self.sinks)

    def _queries(self, q_BSR: Tensor) -> Tensor:
        if self.q_lora_rank is None:
            return self.q_proj(q_BSR)
        return self.q_b_proj(self.q_a_norm(q_BSR))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, H * width] -> [B, H, L, width]."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


def softmax_scale(cfg: MlaConfig) -> float:
    """Compute ``(N + P) ** -0.5``; with YaRN times the square of ``yarn_mscale`` of ``mscale_all_dim``."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    if cfg.yarn is None or cfg.yarn.mscale_all_dim is None:
        return scale
    return scale * yarn_mscale(cfg.yarn.factor, cfg.yarn.mscale_all_dim) ** 2
