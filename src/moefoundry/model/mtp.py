"""Multi-token prediction: small modules that learn to predict tokens further ahead (DeepSeek-V3, arXiv 2412.19437,
section 2.2; the layout is that of the published weights).

Module k sees, at position i, what the module before it made of the tokens up to i + k - 1 (module 1: the main model's
hidden state after its final norm) and the embedding of token i + k, and predicts token i + k + 1. Embedding and output
head are the main model's own, so they stay with the caller. Positions without a token i + k are left out: a sequence of
S tokens is S - k long in module k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moefoundry.config import ModelConfig
from moefoundry.model.context import AttentionContext
from moefoundry.model.norm import build_norm
from moefoundry.moe.layer import RoutingStats


class MTPModule(nn.Module):
    """One further token.

    Args:
        cfg: The model's.
        block: A transformer block with experts, of this module's own.

    Attributes:
        embedding_norm, hidden_norm, proj, norm: In DeepSeek's weights ``enorm``, ``hnorm``, ``eh_proj`` and
            ``shared_head.norm``.
    """

    def __init__(self, cfg: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.embedding_norm = build_norm(cfg.d_model, cfg.norm)
        self.hidden_norm = build_norm(cfg.d_model, cfg.norm)
        self.proj = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.block = block
        self.norm = build_norm(cfg.d_model, cfg.norm)

    def forward(
        self, hidden_BSD: Tensor, embedded_BSD: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, RoutingStats]:
        """One step further.

        Args:
            hidden_BSD: Of the module before, at positions i.
            embedded_BSD: Embeddings of tokens i + k.
            context: Of positions i.

        Returns:
            [B, S, D] for the next module, the same after the norm for the output head, and the block's statistics.
        """
        parts = self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)
        hidden_BSD, stats = self.block(self.proj(torch.cat(parts, dim=-1)), context)
        return hidden_BSD, self.norm(hidden_BSD), stats
