"""Attention: the base class of all kinds, and grouped-query attention; :mod:`moefoundry.model.mla` is another kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moefoundry.config import AttentionBias, GqaConfig, ModelConfig, QkNorm
from moefoundry.config.making import make_part
from moefoundry.model.cache import LayerCache
from moefoundry.model.context import AttentionContext, attend
from moefoundry.model.norm import RMSNorm
from moefoundry.model.rope import Rotation, rotate, rotate_interleaved


class Attention(nn.Module):
    """Base class of the attention kinds.

    Attributes:
        recompute_up_projections: Set by a precision policy that saves memory: the backward pass computes the
            projections up from narrow tensors again. Kinds that have none ignore it.
    """

    recompute_up_projections = False

    def forward(
        self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S, D] -> [B, S, D]; with a cache, the S tokens follow those in it.

        A kind that has a loss of its own gives it for each token, too, [B, S].
        """
        raise NotImplementedError


def build_attention(cfg: ModelConfig) -> Attention:
    """Make the attention module that the recipe declares.

    Raises:
        UserError: There is no such kind.
    """
    kind = cfg.attention.kind
    attention: Attention = make_part("attention_kinds", kind, "model.attention.kind", cfg.attention, cfg)
    return attention


class GroupedQueryAttention(Attention):
    """Causal grouped-query attention with RoPE (arXiv 2305.13245).

    Queries and keys may be normalized over each head (Qwen3), also after their rotation (Hunyuan), or over all heads
    together (OLMoE). ``clip_qkv`` clamps the outputs of the projections (DBRX), or those of the norms (OLMoE). With
    ``output_gate``, ``q_proj`` gives each head a query and then a gate, whose sigmoid multiplies the head's output
    (Qwen3-Next; arXiv 2505.06708). With ``sinks`` a head may attend to nothing (gpt-oss).
    """

    def __init__(self, cfg: GqaConfig, model: ModelConfig) -> None:
        super().__init__()
        d_model, norm_eps = model.d_model, model.norm.eps
        self.head_dim = cfg.head_width(d_model)
        self.turn = rotate_interleaved if cfg.rotary_interleaved else rotate
        self.scale = cfg.softmax_scale
        self.clip_qkv = cfg.clip_qkv
        self.output_gate = cfg.output_gate
        width, kv_width = cfg.projection_widths(d_model)
        self.norm_after_rope = cfg.qk_norm == QkNorm.head_after_rope
        qkv_bias = cfg.bias != AttentionBias.none
        self.q_proj = nn.Linear(d_model, width * (2 if cfg.output_gate else 1), bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, d_model, bias=cfg.bias == AttentionBias.all)
        self.sinks = nn.Parameter(torch.empty(cfg.n_heads)) if cfg.sinks else None
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if cfg.qk_norm != QkNorm.none:
            per_head, zero_centered = cfg.qk_norm != QkNorm.full, model.norm.zero_centered
            self.q_norm = RMSNorm(self.head_dim if per_head else width, norm_eps, zero_centered)
            self.k_norm = RMSNorm(self.head_dim if per_head else kv_width, norm_eps, zero_centered)

    def forward(self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        queries, gates = self.q_proj(x_BSD), None
        if self.output_gate:
            queries, gates = (x.flatten(-2) for x in queries.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1))
        q_BHSd = self._rotated_heads(queries, self.q_norm, context.rotation)
        k_BHLd = self._rotated_heads(self.k_proj(x_BSD), self.k_norm, context.rotation)
        v_BHLd = self._heads(self.v_proj(x_BSD), None)
        if cache is not None:
            k_BHLd, v_BHLd = cache.append(k_BHLd, v_BHLd, window=context.window)
        out = attend(q_BHSd, k_BHLd, v_BHLd, context, self.scale, self.sinks)
        return self.o_proj(out if gates is None else out * gates.sigmoid())

    def _rotated_heads(self, x: Tensor, norm: RMSNorm | None, rotation: Rotation) -> Tensor:
        """[B, S, H * d] -> [B, H, S, d], rotated, and normalized before or after that."""
        if norm is None or not self.norm_after_rope:
            return self._rotate(self._heads(x, norm), rotation)
        return norm(self._rotate(self._heads(x, None), rotation))

    def _rotate(self, x_BHSd: Tensor, rotation: Rotation) -> Tensor:
        """Turn the first elements of each head, as many as the rotation has (most families turn whole heads)."""
        if rotation.width == 0:
            return x_BHSd
        if rotation.width == self.head_dim:
            return self.turn(x_BHSd, rotation)
        turned, rest = x_BHSd.split([rotation.width, self.head_dim - rotation.width], dim=-1)
        return torch.cat([self.turn(turned, rotation), rest], dim=-1)

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[B, S, H * d] -> [B, H, S, d], normalized over as many elements as the norm has weights, and clamped."""
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
        if self.clip_qkv is not None:
            x = x.clamp(-self.clip_qkv, self.clip_qkv)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
