"""The MoE layer: route -> dispatch -> experts -> combine, plus the shared experts.

Follow one token: the router scores it against every expert and keeps the best K; ``dispatch`` copies it into the rows
of those experts; each expert is a SwiGLU over its rows; ``combine`` adds the K results with the router's weights; the
shared experts, which see every token, are added on top. No token is ever dropped.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moefoundry.config import AuxLossScope, MoEConfig
from moefoundry.moe.balance import balance_loss, router_entropy, z_loss
from moefoundry.moe.dispatch import LocalDispatcher, TokenDispatcher
from moefoundry.moe.experts import FeedForward, GroupedExperts
from moefoundry.moe.router import Router, Routing
from moefoundry.ops.grouped_linear import BACKENDS


class RoutingStats(NamedTuple):
    """One layer's losses and statistics of one micro-batch; returned, never stored.

    Attributes:
        balance_loss, z_loss: Scalars, differentiable, unweighted, means over tokens.
        tokens_per_expert: int64 [E].
        router_entropy: Scalar, nats, not differentiable.
    """

    balance_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: Tensor
    router_entropy: Tensor


class MoELayer(nn.Module):
    """A drop-in for the dense FFN that also returns :class:`RoutingStats`."""

    def __init__(self, d_model: int, cfg: MoEConfig) -> None:
        super().__init__()
        self.router = Router(d_model, cfg.num_experts, cfg.top_k, cfg.router)
        self.experts = GroupedExperts(cfg.num_experts, d_model, cfg.expert_hidden_size, BACKENDS[cfg.backend])
        self.shared_experts = (
            FeedForward(d_model, cfg.num_shared_experts * cfg.expert_hidden_size) if cfg.num_shared_experts else None
        )
        self.dispatcher: TokenDispatcher = LocalDispatcher(cfg.num_experts)
        self.aux_loss_scope = cfg.balance.aux_loss_scope

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RoutingStats]:
        """[B, S, D] -> [B, S, D] and the statistics of its B * S tokens."""
        tokens_TD = x_BSD.flatten(0, 1)
        routing: Routing = self.router(tokens_TD)
        rows_RD, metadata = self.dispatcher.dispatch(tokens_TD, routing.topk_expert_ids)
        rows_RD = self.experts(rows_RD, metadata.tokens_per_local_expert)
        out_TD = self.dispatcher.combine(rows_RD, routing.topk_weights, metadata)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(tokens_TD)
        return out_TD.view_as(x_BSD), self._stats(routing, metadata.order.tokens_per_expert_E, x_BSD.shape[0])

    def _stats(self, routing: Routing, tokens_per_expert_E: Tensor, num_sequences: int) -> RoutingStats:
        num_segments = num_sequences if self.aux_loss_scope == AuxLossScope.sequence else 1
        return RoutingStats(
            balance_loss=balance_loss(routing.scores, routing.topk_expert_ids, num_segments),
            z_loss=z_loss(routing.router_logits),
            tokens_per_expert=tokens_per_expert_E,
            router_entropy=router_entropy(routing.scores.detach()),
        )
