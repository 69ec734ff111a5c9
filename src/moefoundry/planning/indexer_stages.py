"""Memory of the indexers of sparse attention, in bytes a token of sequences of L tokens.

H heads of width d score the L keys of each query, in fp32, in every forward pass of a sequence that is longer than
``top_k``: products, and what is made of them, exist two at a time, beside their sum. Attention keeps the choice as a
mask, one value a pair. Where the scores learn, their inputs and factors are kept, and the backward pass computes the
distributions of some queries at a time again, those of the heads of attention too. In the stage ``warm_up`` nothing
else learns, so nothing else is kept but attention's queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config import IndexerConfig, IndexerStage, MlaConfig
from moefoundry.ops.sizes import INDEXER_QUERIES
from moefoundry.planning.units import FP32


@dataclass(frozen=True)
class IndexerBytes:
    """Bytes a token.

    Attributes:
        choice: Exist while the keys are chosen, in a forward pass.
        mask: Kept by attention.
        factors: Kept by the scores, where they learn.
        learning: Exist while the scores' gradients are computed.
        compared: Queries and keys of attention, which a block keeps for the scores where these alone learn; else 0.
    """

    choice: float = 0.0
    mask: float = 0.0
    factors: float = 0.0
    learning: float = 0.0
    compared: float = 0.0


def indexer_bytes(cfg: MlaConfig, d_model: int, seq_len: int, c: int) -> IndexerBytes:
    """Estimate the memory of a block's indexer; all is 0 where there is none, or where every key is seen.

    Args:
        cfg: Attention.
        d_model: Width of its input.
        seq_len: L.
        c: Bytes of the compute dtype.
    """
    indexer = cfg.indexer
    if indexer is None or cfg.q_lora_rank is None:
        return IndexerBytes()
    learns, alone = indexer.stage != IndexerStage.frozen, indexer.stage == IndexerStage.warm_up
    sparse = seq_len > indexer.top_k and not alone
    if not (learns or sparse):
        return IndexerBytes()
    heads, width = indexer.n_heads, indexer.head_dim
    factors = FP32 * (heads * width + width + heads)
    scores = (2 * heads + 1) * FP32 * seq_len
    inputs = c * (d_model + 2 * cfg.q_lora_rank)
    return IndexerBytes(
        choice=inputs + factors + scores if sparse else 0.0,
        mask=(c + learns) * seq_len if sparse else 0.0,
        factors=_kept(indexer, d_model, cfg.q_lora_rank, c) if learns else 0.0,
        learning=_learning(cfg, indexer, seq_len, c, sparse) if learns else 0.0,
        compared=2 * c * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) if alone else 0.0,
    )


def _kept(cfg: IndexerConfig, d_model: int, query_rank: int, c: int) -> float:
    """Count what the scores keep: their factors, the keys before their norm, and inputs that only they have."""
    own = FP32 * (d_model + query_rank) if c < FP32 else FP32 * query_rank
    return own + FP32 * (cfg.n_heads * cfg.head_dim + 2 * cfg.head_dim + cfg.n_heads)


def _learning(cfg: MlaConfig, indexer: IndexerConfig, seq_len: int, c: int, sparse: bool) -> float:
    """Count what exists while the distributions of some queries, P, are computed again and run backward."""
    queries, width = min(INDEXER_QUERIES, seq_len), cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    keys = FP32 * cfg.n_heads * width if c < FP32 else 0
    of_attention = 2 * FP32 * cfg.n_heads * queries + keys
    of_scores = 4 * FP32 * indexer.n_heads * queries
    gradients = 2 * FP32 * indexer.n_heads * indexer.head_dim
    return max(of_attention + (0 if sparse else 2 * seq_len), of_scores) + gradients
