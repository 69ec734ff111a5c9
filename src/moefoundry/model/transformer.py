"""The decoder-only MoE transformer.

    embed_tokens -> n_layers x [x + attention(norm(x)); x + ffn(norm(x))] -> norm -> lm_head

The first ``n_dense_layers`` blocks have a dense FFN, the others an MoE layer. Nothing here depends on how many devices
there are. Build it under ``torch.device("meta")`` and give it weights with ``model/init.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, overload

import torch
from torch import Tensor, nn

from moefoundry.config import AuxLossScope, ModelConfig
from moefoundry.model.attention import GroupedQueryAttention, build_attention
from moefoundry.model.norm import RMSNorm
from moefoundry.model.rope import Rotation
from moefoundry.moe.balance import StepCounts, balance_loss_of_means
from moefoundry.moe.experts import FeedForward
from moefoundry.moe.layer import MoELayer, RoutingStats
from moefoundry.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from moefoundry.ops.rounding import round_gradient, round_operand


class CausalLMLosses(NamedTuple):
    """Losses and statistics of one micro-batch.

    Attributes:
        lm: Mean cross entropy over the targets that are not ignored, nats.
        balance, z: Sums over MoE layers of the layers' losses (means over tokens), times the recipe's weights, so that
            ``lm + balance + z`` is what is minimized.
        num_targets: int64 scalar, targets that count.
        tokens_per_expert: int64 [L, E], one row for each MoE layer.
        router_entropy: [L], nats.
    """

    lm: Tensor
    balance: Tensor
    z: Tensor
    num_targets: Tensor
    tokens_per_expert: Tensor
    router_entropy: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimized."""
        return self.lm + self.balance + self.z


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm.eps)
        self.attention: GroupedQueryAttention = build_attention(cfg)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm.eps)
        self.ffn: FeedForward | MoELayer = (
            FeedForward(cfg.d_model, cfg.ffn_hidden_size)
            if layer_index < cfg.n_dense_layers or layer_index in cfg.dense_layers
            else MoELayer(cfg.d_model, cfg.moe)
        )

    def forward(self, x_BSD: Tensor, rot: Rotation) -> tuple[Tensor, RoutingStats | None]:
        """[B, S, D] -> [B, S, D], and the routing statistics if the block has experts."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rot)
        if isinstance(self.ffn, MoELayer):
            out_BSD, stats = self.ffn(self.ffn_norm(x_BSD))
            return x_BSD + out_BSD, stats
        return x_BSD + self.ffn(self.ffn_norm(x_BSD)), None


class OutputHead(nn.Linear):
    """The output projection, which also computes the loss without ever holding all logits.

    Attributes:
        operand_dtype: Set by a precision policy that emulates a narrow product; None otherwise.
    """

    operand_dtype: torch.dtype | None = None

    def forward(self, hidden_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, V], or with ``targets_BS`` the sum of their cross entropies, a scalar."""
        if targets_BS is None:
            return self._logits(hidden_BSD)
        return linear_cross_entropy(
            hidden_BSD.flatten(0, 1), self.weight, targets_BS.flatten(), operand_dtype=self.operand_dtype
        )

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        if self.operand_dtype is None:
            return super().forward(hidden_BSD)
        operands = (round_operand(x, self.operand_dtype) for x in (hidden_BSD, self.weight))
        return round_gradient(nn.functional.linear(*operands), self.operand_dtype)


class MoETransformer(nn.Module):
    """``model(input_ids)`` gives logits; ``model(input_ids, labels)`` gives losses.

    Attributes:
        step_counts: Set for ``aux_loss_scope: global_batch``; whoever trains calls its ``begin_step``.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        global_balance = cfg.moe.balance.aux_loss_scope == AuxLossScope.global_batch
        self.step_counts = StepCounts(None) if global_balance else None
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]  # typed as what it holds
            Block(cfg, index) for index in range(cfg.n_layers)
        )
        self.norm = RMSNorm(cfg.d_model, cfg.norm.eps)
        self.lm_head = OutputHead(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep tied weights tied: ``nn.Module`` gives each module a tensor of its own when it leaves meta."""
        super()._apply(fn, recurse)
        if self.cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        return self

    @overload
    def forward(self, input_ids_BS: Tensor, labels_BS: None = None) -> Tensor: ...
    @overload
    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor) -> CausalLMLosses: ...
    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor | CausalLMLosses:
        """Run the model.

        Args:
            input_ids_BS: int64 [B, S].
            labels_BS: int64 [B, S], usually ``input_ids_BS`` itself; shifted here, so that position s predicts label
                s + 1. ``IGNORE_INDEX`` counts nothing.

        Returns:
            Logits [B, S, V] in the compute dtype without labels, else :class:`CausalLMLosses`.
        """
        x_BSD = self.embed_tokens(input_ids_BS)
        rot = self.layers[0].attention.rotation(input_ids_BS.shape[1], input_ids_BS.device)
        stats: list[RoutingStats] = []
        for layer in self.layers:
            x_BSD, layer_stats = layer(x_BSD, rot)
            if layer_stats is not None:
                stats.append(layer_stats)
        hidden_BSD = self.norm(x_BSD)
        if labels_BS is None:
            return self.lm_head(hidden_BSD)
        targets_BS = nn.functional.pad(labels_BS[:, 1:], (0, 1), value=IGNORE_INDEX)
        num_targets = (targets_BS != IGNORE_INDEX).sum()
        lm = self.lm_head(hidden_BSD, targets_BS) / num_targets.clamp(min=1)
        return self._losses(lm, num_targets, stats)

    def _losses(self, lm: Tensor, num_targets: Tensor, stats: list[RoutingStats]) -> CausalLMLosses:
        weights = self.cfg.moe.balance
        none = lm.new_zeros(())
        counts_LE = (
            torch.stack([s.tokens_per_expert for s in stats])
            if stats
            else num_targets.new_zeros((0, self.cfg.moe.num_experts))
        )
        return CausalLMLosses(
            lm=lm,
            balance=sum(self._balance_losses(stats, counts_LE), start=none) * weights.aux_loss_weight,
            z=sum((s.z_loss for s in stats), start=none) * weights.z_loss_weight,
            num_targets=num_targets,
            tokens_per_expert=counts_LE,
            router_entropy=torch.stack([s.router_entropy for s in stats]) if stats else none.new_zeros((0,)),
        )

    def _balance_losses(self, stats: list[RoutingStats], counts_LE: Tensor) -> list[Tensor]:
        """Of each MoE layer. Here and not in the layers, counts of the whole step cost one exchange for all layers, and
        recomputed activations count nothing twice."""
        if self.step_counts is None or not (self.training and torch.is_grad_enabled()):
            return [s.balance_loss for s in stats]
        step_counts_LE = self.step_counts.add(counts_LE)
        return [
            balance_loss_of_means(s.mean_probs, counts_E) for s, counts_E in zip(stats, step_counts_LE, strict=True)
        ]
