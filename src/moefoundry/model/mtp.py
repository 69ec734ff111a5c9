"""Multi-token prediction: modules that learn to predict tokens further ahead (DeepSeek-V3, arXiv 2412.19437, sec. 2.2).

The layout is that of the published weights. At position i, module k takes two inputs: the output of the module before
it, which has seen the tokens up to i + k - 1 (for module 1: the main model's hidden state after its final norm), and
the embedding of token i + k. It predicts token i + k + 1. Embedding and output head are the main model's. Positions
without a token i + k are left out: a sequence of S tokens has S - k positions in module k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moefoundry.config import ModelConfig
from moefoundry.model.block_stats import BlockStats
from moefoundry.model.context import AttentionContext
from moefoundry.model.norm import build_norm


class MTPModule(nn.Module):
    """Module for one further token.

    Args:
        cfg: The model's config.
        block: A transformer block with experts, for this module.

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
        self, hidden_BSD: Tensor, embedded_BSD: Tensor, context: AttentionContext, real_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, BlockStats]:
        """Predict one token further.

        Args:
            hidden_BSD: Output of the module before, at positions i.
            embedded_BSD: Embeddings of tokens i + k.
            context: Context of positions i.
            real_T: Positions i of which i and i + k are no padding, as :class:`~moefoundry.moe.layer.MoELayer` takes
                them.

        Returns:
            [B, S, D] for the next module, the same after the norm for the output head, and the block's statistics.
        """
        parts = self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)
        hidden_BSD, stats = self.block(self.proj(torch.cat(parts, dim=-1)), context, None, real_T)
        return hidden_BSD, self.norm(hidden_BSD), stats
