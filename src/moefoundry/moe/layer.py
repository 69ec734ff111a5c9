"""The MoE layer: route -> dispatch -> experts -> combine, plus the shared experts.

Follow one token. The router scores it against every expert and keeps the best K. ``dispatch`` sends it to the ranks of
those experts. There it becomes a row of each of its experts there; each expert is a SwiGLU over its rows, and the
results, times the router's weights, are added up. The sums come back and are added. The output of the shared experts,
which see every token, is added. No token is dropped, unless the recipe sets a capacity: then, in training, a slot that
its expert cannot take is not dispatched, and adds nothing. Padding is left out at the very beginning: to routing,
losses and statistics it is as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moefoundry.config import AuxLossScope, MoEConfig
from moefoundry.moe.balance import mean_over_tokens, statistics
from moefoundry.moe.dispatch import LocalDispatcher, TokenDispatcher
from moefoundry.moe.experts import FeedForward, GroupedExperts, TokenGate
from moefoundry.moe.router import Router, Routing, within_capacity
from moefoundry.ops.permute import place_rows
from moefoundry.ops.swiglu import PLAIN, Activation


class RoutingStats(NamedTuple):
    """Losses and statistics of one layer in one micro-batch.

    Attributes:
        balance_loss, z_loss: Scalars, differentiable, unweighted, means over tokens.
        mean_probs: [E], differentiable; mean normalized scores, for a balance loss over more than the micro-batch.
        tokens_per_expert: int64 [E], as routed: slots that a capacity then drops are counted, too.
        dropped_slots: int64 scalar, slots that a capacity dropped.
        router_entropy: Scalar, nats, not differentiable.
        losses: [len(router_losses)], differentiable, means over tokens; None in evaluation.
    """

    balance_loss: Tensor
    z_loss: Tensor
    mean_probs: Tensor
    tokens_per_expert: Tensor
    dropped_slots: Tensor
    router_entropy: Tensor
    losses: Tensor | None = None

    def weighted(self, weight: Tensor) -> RoutingStats:
        """Multiply the losses, and the mean scores that a loss is computed from, by a scalar."""
        weight = weight.to(self.z_loss.dtype)
        return self._replace(
            balance_loss=self.balance_loss * weight,
            z_loss=self.z_loss * weight,
            mean_probs=self.mean_probs * weight,
            losses=None if self.losses is None else self.losses * weight,
        )


class MoELayer(nn.Module):
    """Mixture-of-Experts layer: takes the place of a dense FFN, and also returns :class:`RoutingStats`.

    Attributes:
        dispatcher: Brings tokens to their experts; expert parallelism sets another.
        router_losses: Further losses of training, ``(router_logits_TE, scores_TE) -> values_T``.
    """

    def __init__(self, d_model: int, cfg: MoEConfig, activation: Activation = PLAIN) -> None:
        super().__init__()
        shared_width = cfg.num_shared_experts * cfg.expert_hidden_size
        self.router = Router(d_model, cfg)
        self.experts = GroupedExperts(d_model, cfg, activation)
        self.shared_experts = FeedForward(d_model, shared_width, activation) if shared_width else None
        self.shared_gate = TokenGate(d_model) if cfg.shared_expert_gate else None
        self.dispatcher: TokenDispatcher = LocalDispatcher(cfg.num_experts)
        self.router_losses: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
        self.aux_loss_scope = cfg.balance.aux_loss_scope
        self.capacity_factor = cfg.capacity_factor
        self.dispatch_chunks = cfg.dispatch_chunks

    def forward(self, x_BSD: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """Compute the output, [B, S, D] -> [B, S, D], and the statistics of the tokens.

        Args:
            x_BSD: A batch of sequences.
            real_T: int64 [T], ascending; places of the real tokens among the B * S. The others have no experts, and an
                output of 0. None is a batch without padding.
        """
        tokens_TD = x_BSD.flatten(0, 1)
        if real_T is not None:
            tokens_TD = tokens_TD.index_select(0, real_T)
        by_sequence = self.aux_loss_scope == AuxLossScope.sequence
        routing: Routing = self.router(tokens_TD, x_BSD.shape[0] if by_sequence and real_T is None else 1)
        tokens_TD = tokens_TD if routing.tokens is None else routing.tokens
        kept_TK = None
        if self.capacity_factor is not None and self.training:
            kept_TK = within_capacity(routing.scores.detach(), routing.topk_expert_ids, self.capacity_factor)
        routed = routing.topk_expert_ids, routing.topk_weights, kept_TK
        exchange = self.dispatcher.dispatch(tokens_TD, *routed, self.dispatch_chunks if self.training else 1)
        shared_TD = self._shared(tokens_TD)  # while tokens are exchanged
        sequence_T = None if real_T is None else real_T // x_BSD.shape[1]
        stats = self._stats(routing, kept_TK, x_BSD.shape[0], sequence_T)
        out_TD = exchange.mix(self.experts)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        if real_T is not None:
            out_TD = place_rows(out_TD, real_T, x_BSD.shape[:2].numel())
        return out_TD.view_as(x_BSD), stats

    def _shared(self, tokens_TD: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        out_TD = self.shared_experts(tokens_TD)
        return out_TD if self.shared_gate is None else self.shared_gate(tokens_TD) * out_TD

    def _stats(
        self, routing: Routing, kept_TK: Tensor | None, num_sequences: int, sequence_T: Tensor | None
    ) -> RoutingStats:
        by_sequence = self.aux_loss_scope == AuxLossScope.sequence
        means = statistics(routing, *((num_sequences, sequence_T) if by_sequence else (1, None)))
        return RoutingStats(
            **means._asdict(),
            dropped_slots=means.tokens_per_expert.new_zeros(()) if kept_TK is None else (~kept_TK).sum(),
            losses=self._further_losses(routing),
        )

    def _further_losses(self, routing: Routing) -> Tensor | None:
        if not (self.training and self.router_losses):
            return None
        values = [loss(routing.router_logits, routing.scores) for loss in self.router_losses]
        return torch.stack([mean_over_tokens(values_T) for values_T in values])
