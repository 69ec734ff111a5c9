"""The decoder-only MoE transformer.

    embed_tokens -> n_layers x [x + attention(norm(x)); x + ffn(norm(x))] -> norm -> lm_head

The first ``n_dense_layers`` blocks have a dense FFN, the others an MoE layer. In training, multi-token prediction
(``model/mtp.py``) goes on from the last hidden states. Nothing here depends on how many devices there are. Build it
under ``torch.device("meta")`` and give it weights with ``model/init.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Self, cast, overload

import torch
from torch import Tensor, nn

from moefoundry.config import AuxLossScope, Gather, IndexerStage, ModelConfig, NormPosition, Reduce
from moefoundry.model.attention import Attention, build_attention
from moefoundry.model.block_stats import BlockStats
from moefoundry.model.cache import KVCache, LayerCache
from moefoundry.model.context import (
    AttentionContext,
    AttentionKind,
    Documents,
    attention_contexts,
    lengths_for_longrope,
)
from moefoundry.model.indexer import train_indexers_alone
from moefoundry.model.linear_attention import GatedDeltaNet
from moefoundry.model.losses import LogitsLoss, NamedLoss, RouterLoss, values_of, weighted
from moefoundry.model.mtp import MTPModule
from moefoundry.model.norm import Norm, build_norm
from moefoundry.model.output_head import OutputHead, multiplied
from moefoundry.model.padding import RealTokens
from moefoundry.model.preferences import log_probs_of_pairs
from moefoundry.model.targets import count_targets, shifted_targets
from moefoundry.moe.balance import StepCounts, balance_loss_of_means, mean_over_tokens
from moefoundry.moe.experts import FeedForward
from moefoundry.moe.layer import MoELayer, RoutingStats
from moefoundry.ops.recompute import ending_the_block
from moefoundry.ops.swiglu import Activation


class CausalLMLosses(NamedTuple):
    """Losses and statistics of one micro-batch.

    Attributes:
        lm: Mean cross entropy over the targets that are not ignored, nats.
        balance, z: Sums over MoE layers of the layers' losses (means over tokens), times the recipe's weights.
        mtp: Multi-token prediction, times its weight; 0 without it, and in evaluation.
        indexer: Sum of ``indexer_kl``, times the recipe's weight; 0 where no indexer learns.
        num_targets: int64 scalar, targets that count.
        tokens_per_expert: int64 [L, E], one row for each MoE layer; in training, multi-token prediction's come last.
        dropped_slots: int64 [L], slots that a capacity dropped.
        router_entropy: [L], nats.
        lm_of_rows: [B], sums of the cross entropy over the targets of each row, without gradient; None if the model
            does not tell rows apart.
        of_targets, of_tokens: The recipe's ``losses`` by name, times their weights: means over targets, and sums over
            MoE layers of means over tokens. Empty in evaluation.
        log_probs: [B, 2], log-probabilities of the responses of pairs, where the model is to give them.
        indexer_kl: [L], divergences of the indexers' choice, means over tokens; those of multi-token prediction come
            last. None where no indexer learns.
    """

    lm: Tensor
    balance: Tensor
    z: Tensor
    mtp: Tensor
    indexer: Tensor
    num_targets: Tensor
    tokens_per_expert: Tensor
    dropped_slots: Tensor
    router_entropy: Tensor
    of_targets: dict[str, Tensor]
    of_tokens: dict[str, Tensor]
    log_probs: Tensor | None = None
    lm_of_rows: Tensor | None = None
    indexer_kl: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The loss that is minimized."""
        further = [*self.of_targets.values(), *self.of_tokens.values()]
        return sum(further, start=self.lm + self.balance + self.z + self.mtp + self.indexer)


class Block(nn.Module):
    """Transformer block, with norms before attention and FFN, after them, or both; the second are ``post`` then.

    Attributes:
        kind: Kind of its attention.
    """

    def __init__(self, cfg: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.kind = AttentionKind(cfg.attention.window_of(layer_index), cfg.attention.is_rotated(layer_index))
        activation = Activation(cfg.swiglu.alpha, cfg.swiglu.limit, cfg.swiglu.offset)
        self.attention_norm = build_norm(cfg.d_model, cfg.norm)
        self.attention: Attention = GatedDeltaNet(cfg) if cfg.is_linear(layer_index) else build_attention(cfg)
        self.ffn_norm = build_norm(cfg.d_model, cfg.norm)
        self.norm_after = cfg.norm.position == NormPosition.after
        both = cfg.norm.position == NormPosition.both
        self.attention_post_norm = build_norm(cfg.d_model, cfg.norm) if both else None
        self.ffn_post_norm = build_norm(cfg.d_model, cfg.norm) if both else None
        self.residual = cfg.multipliers.residual
        self.ffn: FeedForward | MoELayer = (
            FeedForward(cfg.d_model, cfg.dense_width, activation)
            if cfg.is_dense(layer_index)
            else MoELayer(cfg.d_model, cfg.moe, activation)
        )

    def forward(
        self,
        x_BSD: Tensor,
        context: AttentionContext,
        cache: LayerCache | None = None,
        real_T: Tensor | None = None,
    ) -> tuple[Tensor, BlockStats]:
        """Compute [B, S, D] -> [B, S, D], and statistics.

        ``real_T`` tells tokens from padding, as :class:`~moefoundry.moe.layer.MoELayer` takes them.
        """
        attended = self.attention(self._input(self.attention_norm, x_BSD), context, cache)
        kl: Tensor | None = None
        if isinstance(attended, tuple):
            attended, kl_BS = attended
            kl_T = kl_BS.flatten()
            kl = mean_over_tokens(kl_T if real_T is None else kl_T.index_select(0, real_T))
        x_BSD = x_BSD + self._output(self.attention_norm, self.attention_post_norm, attended)
        ffn, routing = self.ffn, None
        if isinstance(ffn, MoELayer):
            unread = not self.norm_after and self.ffn_post_norm is None
            with ending_the_block(unread and ffn.dispatch_chunks == 1):  # as on every other rank
                out_BSD, routing = ffn(self._input(self.ffn_norm, x_BSD), real_T)
        else:
            out_BSD = ffn(self._input(self.ffn_norm, x_BSD))
        return x_BSD + self._output(self.ffn_norm, self.ffn_post_norm, out_BSD), BlockStats(routing, kl)

    def _input(self, norm: Norm, x_BSD: Tensor) -> Tensor:
        return x_BSD if self.norm_after else norm(x_BSD)

    def _output(self, norm: Norm, post_norm: Norm | None, out_BSD: Tensor) -> Tensor:
        last = norm if self.norm_after else post_norm
        return multiplied(out_BSD if last is None else last(out_BSD), self.residual)


def meta_model(cfg: ModelConfig) -> MoETransformer:
    """Build the model without values."""
    with torch.device("meta"):
        return MoETransformer(cfg)


class MoETransformer(nn.Module):
    """``model(input_ids)`` gives logits; ``model(input_ids, labels)`` gives losses.

    Attributes:
        step_counts: Set for ``aux_loss_scope: global_batch``; the training loop calls its ``begin_step``.
        tokens_per_sample: float64 [1 + MTP depth]; mean number of real tokens of a sample of the global batch, and of
            those that each module of multi-token prediction has. The training loop sets it where batches may be padded:
            with it, every token of the global batch counts equally, as ranks and micro-batches are averaged by their
            samples. With None, losses are means over the tokens of their micro-batch.
        pairs: Rows are pairs of documents, and their log-probabilities are wanted, too.
        tells_rows_apart: Give the loss of each row, too.
        logits_losses, router_losses: The recipe's ``losses``; :meth:`use_losses` sets them.
        gather, reduce: The recipe's ``mesh.gather`` and ``mesh.reduce``, where it is sharded.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.tells_rows_apart = False
        self.logits_losses: list[NamedLoss] = []
        self.router_losses: list[NamedLoss] = []
        global_balance = cfg.moe.balance.aux_loss_scope == AuxLossScope.global_batch
        self.step_counts = StepCounts(None) if global_balance else None
        self.tokens_per_sample: Tensor | None = None
        self.pairs = False
        self.gather, self.reduce = Gather.each_pass, Reduce.each_micro_batch
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]  # typed as what it holds
            Block(cfg, index) for index in range(cfg.n_layers)
        )
        self.norm = build_norm(cfg.d_model, cfg.norm)
        self.lm_head = OutputHead(cfg.d_model, cfg.vocab_size, bias=cfg.head_bias)
        self.lm_head.divisor = cfg.multipliers.logits_divisor
        self.mtp: Sequence[MTPModule] = nn.ModuleList(  # type: ignore[assignment]  # as above
            MTPModule(cfg, Block(cfg, cfg.n_layers + index)) for index in range(cfg.mtp.depth)
        )
        if cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        trained = cfg.attention.trained_indexer
        self.indexer_weight = 0.0 if trained is None else trained.loss_weight
        if trained is not None and trained.stage == IndexerStage.warm_up:
            train_indexers_alone(self)

    @property
    def blocks(self) -> list[Block]:
        """All blocks; those of multi-token prediction are last."""
        return [*self.layers, *(cast(Block, module.block) for module in self.mtp)]

    def use_losses(self, losses: Sequence[NamedLoss]) -> None:
        """Train with further losses."""
        self.logits_losses = [named for named in losses if isinstance(named.loss, LogitsLoss)]
        self.router_losses = [named for named in losses if isinstance(named.loss, RouterLoss)]
        for block in self.blocks:
            if isinstance(block.ffn, MoELayer):
                block.ffn.router_losses = [partial(values_of, each) for each in self.router_losses]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep tied weights tied: ``nn.Module`` gives each module a tensor of its own when it leaves meta."""
        super()._apply(fn, recurse)
        if self.cfg.tie_embeddings:
            self.lm_head.register_parameter("weight", next(self.embed_tokens.parameters()))
        return self

    @overload
    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: None = None,
        *,
        sequence_id: Tensor | None = None,
        tokens_of_rows: Sequence[int] | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        *,
        sequence_id: Tensor | None = None,
        tokens_of_rows: Sequence[int] | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
    ) -> CausalLMLosses: ...
    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor | None = None,
        *,
        sequence_id: Tensor | None = None,
        tokens_of_rows: Sequence[int] | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor | CausalLMLosses:
        """Run the model.

        Args:
            input_ids_BS: int64 [B, S].
            labels_BS: int64 [B, S], usually ``input_ids_BS`` itself; shifted here, so that position s predicts label
                s + 1. ``IGNORE_INDEX`` is no target.
            sequence_id: int64 [B, S]; the tokens of a document have the same number, ascending in a row, and padding at
                its end has -1 and ``IGNORE_INDEX`` as label. ``document_masking`` computes each document as if it were
                alone, and requires it in training and with labels; without it each row is one document. Otherwise it
                tells padding only, which is never routed or counted.
            tokens_of_rows: Tokens of each row that are no padding; None counts them, for which the host waits.
            document_lengths: Tokens of each document of each row, padding included; None likewise, where they matter.
            cache: Cache of the tokens before these, to which these are added; each row is one document then.

        Returns:
            Logits [B, S, V] in the compute dtype without labels, else :class:`CausalLMLosses`.

        Raises:
            ValueError: ``document_masking`` without ``sequence_id``, in training or with labels.
        """
        documents = None
        if self.cfg.document_masking and cache is None:
            documents = self._documents(sequence_id, document_lengths, required=self.training or labels_BS is not None)
        ids_BS = None if documents is None else documents.ids_BS
        real = None if sequence_id is None or cache is not None else RealTokens.of(sequence_id, tokens_of_rows)
        real_T = None if real is None else real.places()
        x_BSD = embedded_BSD = multiplied(self.embed_tokens(input_ids_BS), self.cfg.multipliers.embedding)
        kinds, num_cached = [layer.kind for layer in self.layers], 0 if cache is None else cache.length
        lengths = self._lengths(input_ids_BS, documents, real, num_cached)
        contexts = attention_contexts(self.cfg, kinds, input_ids_BS, documents, num_cached, x_BSD.dtype, lengths)
        layer_caches: Sequence[LayerCache | None] = [None] * len(self.layers) if cache is None else cache.layers
        stats: list[BlockStats] = []
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            x_BSD, layer_stats = layer(x_BSD, contexts[layer.kind], layer_cache, real_T)
            stats.append(layer_stats)
        if cache is not None:
            cache.length += input_ids_BS.shape[1]
        hidden_BSD = self.norm(x_BSD)
        if labels_BS is None:
            return self.lm_head(hidden_BSD)
        targets_BS = shifted_targets(labels_BS, ids_BS)
        num_targets = count_targets(targets_BS).sum()
        mtp = None
        if self.training and self.mtp:  # first, so that its blocks run backward when the head's gradients here are used
            further, further_stats = self._predict_further(hidden_BSD, embedded_BSD, labels_BS, documents, real)
            mtp = further * self.cfg.mtp.loss_weight / (len(self.mtp) * num_targets.clamp(min=1))
            stats += further_stats
        lm, log_probs_B2, lm_of_rows = self._cross_entropy(hidden_BSD, targets_BS, ids_BS)
        lm = lm / num_targets.clamp(min=1)
        of_targets = self._of_targets(hidden_BSD, targets_BS, num_targets)
        mtp = torch.zeros_like(lm) if mtp is None else mtp
        losses = self._losses(lm, mtp, of_targets, num_targets, self._weighted(stats, real), log_probs_B2)
        return losses._replace(lm_of_rows=lm_of_rows)

    def _documents(
        self, sequence_id: Tensor | None, lengths: Sequence[Sequence[int]] | None, required: bool
    ) -> Documents | None:
        """Make the documents that do not see each other; None if a row is one."""
        if sequence_id is not None:
            return Documents(sequence_id, lengths)
        if required:
            raise ValueError("model.document_masking is on: the model needs sequence_id, int64 [B, S], too")
        return None

    def _lengths(
        self, input_ids_BS: Tensor, documents: Documents | None, real: RealTokens | None, num_cached: int = 0
    ) -> Tensor | None:
        """Count the tokens of sequences, where rotary embeddings go by them."""
        if self.cfg.attention.longrope is None:
            return None
        padding_BS = None if real is None else real.sequence_id_BS
        return lengths_for_longrope(input_ids_BS, documents, padding_BS, num_cached)

    def _cross_entropy(
        self, hidden_BSD: Tensor, targets_BS: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum the cross entropy over all targets; give pairs' log-probabilities [B, 2] and rows' sums [B] if wanted."""
        if self.pairs:
            assert documents is not None, "document_masking tells pairs apart"
            each_BS = self.lm_head(hidden_BSD, targets_BS, each=True)
            return each_BS.sum(), log_probs_of_pairs(each_BS, documents), each_BS.detach().sum(dim=1)
        if self.tells_rows_apart:
            total, of_rows_B = self.lm_head.sum_and_rows(hidden_BSD, targets_BS)
            return total, None, of_rows_B
        return self.lm_head(hidden_BSD, targets_BS), None, None

    def _of_targets(self, hidden_BSD: Tensor, targets_BS: Tensor, num_targets: Tensor) -> dict[str, Tensor]:
        named = self.logits_losses if self.training else []
        if not named:
            return {}
        sums = self.lm_head.sums_over_targets(named, hidden_BSD, targets_BS)
        return weighted(named, sums / num_targets.clamp(min=1))

    def _predict_further(
        self,
        hidden_BSD: Tensor,
        embedded_BSD: Tensor,
        labels_BS: Tensor,
        documents: Documents | None,
        real: RealTokens | None,
    ) -> tuple[Tensor, list[BlockStats]]:
        """Sum the cross entropy over all modules of multi-token prediction and targets; and list their statistics."""
        if labels_BS.shape[1] <= len(self.mtp):
            raise ValueError(f"sequences of {labels_BS.shape[1]} tokens leave none to model.mtp.depth {len(self.mtp)}")
        sums, stats, ids_BS = [], [], None if documents is None else documents.ids_BS
        lengths = self._lengths(labels_BS, documents, real)  # of whole sequences, as the main model's
        for depth, module in enumerate(self.mtp, start=1):
            rest = None if documents is None else documents.without_last(depth)
            kind, dtype = cast(Block, module.block).kind, hidden_BSD.dtype
            of_rest = lengths[:, :-depth] if lengths is not None and lengths.dim() else lengths
            contexts = attention_contexts(self.cfg, [kind], labels_BS[:, :-depth], rest, 0, dtype, of_rest)
            real_T = None if real is None else real.places(depth)
            hidden_BSD, normed_BSD, module_stats = module(
                hidden_BSD[:, :-1], embedded_BSD[:, depth:], contexts[kind], real_T
            )
            targets_BS = shifted_targets(labels_BS, ids_BS, shift=depth + 1)[:, :-depth]
            sums.append(self.lm_head(normed_BSD, targets_BS))
            stats.append(module_stats)
        return torch.stack(sums).sum(), stats

    def _weighted(self, stats: list[BlockStats], real: RealTokens | None) -> list[BlockStats]:
        """Weigh the losses of blocks by their tokens, where other micro-batches may have more or fewer."""
        if self.tokens_per_sample is None or real is None or not self.training:
            return stats
        of_main, *of_mtp = real.shares(self.tokens_per_sample)
        shares = [of_main] * (len(stats) - len(self.mtp)) + of_mtp
        return [layer.weighted(share) for layer, share in zip(stats, shares, strict=True)]

    def _losses(
        self,
        lm: Tensor,
        mtp: Tensor,
        of_targets: dict[str, Tensor],
        num_targets: Tensor,
        of_blocks: list[BlockStats],
        log_probs_B2: Tensor | None,
    ) -> CausalLMLosses:
        weights = self.cfg.moe.balance
        none = lm.new_zeros(())
        stats = [block.routing for block in of_blocks if block.routing is not None]
        kls = [block.indexer_kl for block in of_blocks if block.indexer_kl is not None]
        counts_LE = (
            torch.stack([s.tokens_per_expert for s in stats])
            if stats
            else num_targets.new_zeros((0, self.cfg.moe.num_experts))
        )
        return CausalLMLosses(
            lm=lm,
            balance=sum(self._balance_losses(stats, counts_LE), start=none) * weights.aux_loss_weight,
            z=sum((s.z_loss for s in stats), start=none) * weights.z_loss_weight,
            mtp=mtp,
            indexer=sum(kls, start=none) * self.indexer_weight,
            num_targets=num_targets,
            tokens_per_expert=counts_LE,
            dropped_slots=torch.stack([s.dropped_slots for s in stats]) if stats else num_targets.new_zeros((0,)),
            router_entropy=torch.stack([s.router_entropy for s in stats]) if stats else none.new_zeros((0,)),
            of_targets=of_targets,
            of_tokens=self._of_tokens(stats),
            log_probs=log_probs_B2,
            indexer_kl=torch.stack(kls) if kls else None,
        )

    def _of_tokens(self, stats: list[RoutingStats]) -> dict[str, Tensor]:
        layers = [s.losses for s in stats if s.losses is not None]
        return weighted(self.router_losses, torch.stack(layers).sum(dim=0)) if layers else {}

    def _balance_losses(self, stats: list[RoutingStats], counts_LE: Tensor) -> list[Tensor]:
        """Compute each MoE layer's balance loss.

        It is computed here and not in the layers: counts of the whole step need one exchange for all layers, and
        recomputed activations are not counted twice.
        """
        if self.step_counts is None or not (self.training and torch.is_grad_enabled()):
            return [s.balance_loss for s in stats]
        step_counts_LE = self.step_counts.add(counts_LE)
        return [
            balance_loss_of_means(s.mean_probs, counts_E) for s, counts_E in zip(stats, step_counts_LE, strict=True)
        ]
