"""Attention kinds, one class each; ``build_attention`` picks the one that the recipe declares."""

from __future__ import annotations

from torch import Tensor, nn

from moefoundry.config import AttentionBias, GqaConfig, MlaConfig, ModelConfig, QkNorm
from moefoundry.model.cache import LayerCache
from moefoundry.model.context import AttentionContext, attend
from moefoundry.model.mla import MultiHeadLatentAttention
from moefoundry.model.norm import RMSNorm
from moefoundry.model.rope import rotate


class GroupedQueryAttention(nn.Module):
    """Causal grouped-query attention with RoPE (arXiv 2305.13245).

    Queries and keys are normalized either over each head, as Qwen3's, or over all heads together, as OLMoE's. What is
    clamped is what leaves the norm (OLMoE) or, without one, the projection (DBRX).
    """

    def __init__(self, d_model: int, cfg: GqaConfig, norm_eps: float) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim or d_model // cfg.n_heads
        self.clip_qkv = cfg.clip_qkv
        width, kv_width = cfg.n_heads * self.head_dim, cfg.n_kv_heads * self.head_dim
        qkv_bias = cfg.bias != AttentionBias.none
        self.q_proj = nn.Linear(d_model, width, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, d_model, bias=cfg.bias == AttentionBias.all)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if cfg.qk_norm != QkNorm.none:
            per_head = cfg.qk_norm == QkNorm.head
            self.q_norm = RMSNorm(self.head_dim if per_head else width, norm_eps)
            self.k_norm = RMSNorm(self.head_dim if per_head else kv_width, norm_eps)

    def forward(self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]; with a cache, S tokens that follow those in it."""
        q_BHSd = rotate(self._heads(self.q_proj(x_BSD), self.q_norm), context.rotation)
        k_BHLd = rotate(self._heads(self.k_proj(x_BSD), self.k_norm), context.rotation)
        v_BHLd = self._heads(self.v_proj(x_BSD), None)
        if cache is not None:
            k_BHLd, v_BHLd = cache.append(k_BHLd, v_BHLd)
        return self.o_proj(attend(q_BHSd, k_BHLd, v_BHLd, context))

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[B, S, H * d] -> [B, H, S, d], normalized over as many elements as the norm has weights, and clamped."""
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
        if self.clip_qkv is not None:
            x = x.clamp(-self.clip_qkv, self.clip_qkv)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def build_attention(cfg: ModelConfig) -> GroupedQueryAttention | MultiHeadLatentAttention:
    """The attention module that ``cfg.attention`` declares.

    Raises:
        ValueError: An attention config without a module.
    """
    if isinstance(cfg.attention, GqaConfig):
        return GroupedQueryAttention(cfg.d_model, cfg.attention, cfg.norm.eps)
    if isinstance(cfg.attention, MlaConfig):
        return MultiHeadLatentAttention(cfg.d_model, cfg.attention)
    raise ValueError(f"model.attention: no module for {type(cfg.attention).__name__}")
