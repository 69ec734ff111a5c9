"""Attention kinds, one class each; ``build_attention`` picks the one that the recipe declares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefoundry.config import GqaConfig, ModelConfig
from moefoundry.model.rope import Rotation, rotate, rotation


class GroupedQueryAttention(nn.Module):
    """Causal grouped-query attention with RoPE (arXiv 2305.13245)."""

    def __init__(self, d_model: int, cfg: GqaConfig) -> None:
        super().__init__()
        self.head_dim = d_model // cfg.n_heads
        self.rope_theta = cfg.rope_theta
        self.q_proj = nn.Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, cfg.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, cfg.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * self.head_dim, d_model, bias=False)

    def rotation(self, seq_len: int, device: torch.device) -> Rotation:
        """The position embedding that ``forward`` takes; the same for every layer."""
        return rotation(seq_len, self.head_dim, self.rope_theta, device)

    def forward(self, x_BSD: Tensor, rot: Rotation) -> Tensor:
        """[B, S, D] -> [B, S, D]; position s sees positions 0 .. s."""
        q, k, v = (
            proj(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(rotate(q, rot), rotate(k, rot), v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def build_attention(cfg: ModelConfig) -> GroupedQueryAttention:
    """The attention module that ``cfg.attention`` declares.

    Raises:
        ValueError: An attention config without a module.
    """
    if isinstance(cfg.attention, GqaConfig):
        return GroupedQueryAttention(cfg.d_model, cfg.attention)
    raise ValueError(f"model.attention: no module for {type(cfg.attention).__name__}")
