"""Which experts a token goes to, and with what weight.

The gate is computed in fp32 whatever the compute dtype (float64 stays float64): a rounded logit sends tokens elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefoundry.config import RouterConfig


class Routing(NamedTuple):
    """What the router decided for T tokens.

    Attributes:
        router_logits: [T, E] fp32, before the score function.
        scores: [T, E] fp32, after it.
        topk_weights: [T, K] fp32, normalized and scaled as the recipe says.
        topk_expert_ids: int64 [T, K], best first, distinct within a token.
    """

    router_logits: Tensor
    scores: Tensor
    topk_weights: Tensor
    topk_expert_ids: Tensor


class Router(nn.Module):
    """Linear gate, scores, top-k."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, cfg: RouterConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.top_k = top_k
        self.normalize_topk = cfg.normalize_topk
        self.scale = cfg.scale

    def forward(self, tokens_TD: Tensor) -> Routing:
        """Route [T, D] tokens."""
        dtype = torch.promote_types(tokens_TD.dtype, torch.float32)
        logits_TE = F.linear(tokens_TD.to(dtype), self.gate.weight.to(dtype))
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.normalize_topk:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(logits_TE, scores_TE, weights_TK * self.scale, expert_ids_TK)
