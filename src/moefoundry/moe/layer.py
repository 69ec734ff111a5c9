"""The MoE layer: route -> dispatch -> experts -> combine, plus the shared experts.

Follow one token: the router scores it against every expert and keeps the best K; ``dispatch`` copies it into the rows
of those experts; each expert is a SwiGLU over its rows; ``combine`` adds the K results with the router's weights; the
shared experts, which see every token, are added on top. No token is ever dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moefoundry.config import AuxLossScope, MoEConfig
from moefoundry.moe.balance import balance_loss, mean_probs, router_entropy, z_loss
from moefoundry.moe.dispatch import LocalDispatcher, TokenDispatcher
from moefoundry.moe.experts import FeedForward, GroupedExperts
from moefoundry.moe.router import Router, Routing
from moefoundry.ops.expert_mixture import PAYS_FROM_BYTES, expert_mixture
from moefoundry.ops.grouped_linear import BACKENDS, grouped_linear
from moefoundry.ops.permute import order_by_expert


class RoutingStats(NamedTuple):
    """One layer's losses and statistics of one micro-batch; returned, never stored.

    Attributes:
        balance_loss, z_loss: Scalars, differentiable, unweighted, means over tokens.
        mean_probs: [E], differentiable; the mean normalized scores, for a balance loss over more than the micro-batch.
        tokens_per_expert: int64 [E].
        router_entropy: Scalar, nats, not differentiable.
    """

    balance_loss: Tensor
    z_loss: Tensor
    mean_probs: Tensor
    tokens_per_expert: Tensor
    router_entropy: Tensor


class MoELayer(nn.Module):
    """A drop-in for the dense FFN that also returns :class:`RoutingStats`.

    Attributes:
        dispatcher: Where experts live; expert parallelism sets another.
    """

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
        out_TD, tokens_per_expert_E = self._routed_experts(tokens_TD, routing)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(tokens_TD)
        return out_TD.view_as(x_BSD), self._stats(routing, tokens_per_expert_E, x_BSD.shape[0])

    def _routed_experts(self, tokens_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """What each token's experts made of it [T, D], and how many tokens each of the E experts got."""
        if self._fused_pays(tokens_TD):
            weights = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
            order = order_by_expert(routing.topk_expert_ids, len(weights[0]))
            return expert_mixture(tokens_TD, routing.topk_weights, *weights, order), order.tokens_per_expert_E
        rows_RD, metadata = self.dispatcher.dispatch(tokens_TD, routing.topk_expert_ids)
        rows_RD = self.experts(rows_RD, metadata.tokens_per_local_expert)
        out_TD = self.dispatcher.combine(rows_RD, routing.topk_weights, metadata)
        return out_TD, metadata.order.tokens_per_expert_E

    def _fused_pays(self, tokens_TD: Tensor) -> bool:
        """Whether the fused CPU function computes the same (fp32, all experts here, products as they are), faster."""
        return (
            tokens_TD.device.type == "cpu"
            and tokens_TD.dtype == torch.float32
            and isinstance(self.dispatcher, LocalDispatcher)
            and self.experts.grouped_linear is grouped_linear
            and tokens_TD.nbytes * self.router.top_k >= PAYS_FROM_BYTES
        )

    def _stats(self, routing: Routing, tokens_per_expert_E: Tensor, num_sequences: int) -> RoutingStats:
        num_segments = num_sequences if self.aux_loss_scope == AuxLossScope.sequence else 1
        return RoutingStats(
            balance_loss=balance_loss(routing.scores, routing.topk_expert_ids, num_segments),
            z_loss=z_loss(routing.router_logits),
            mean_probs=mean_probs(routing.scores),
            tokens_per_expert=tokens_per_expert_E,
            router_entropy=router_entropy(routing.scores.detach()),
        )
