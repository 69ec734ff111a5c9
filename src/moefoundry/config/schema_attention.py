"""The recipe's ``model.attention``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from moefoundry.config.field import MAX_FACTOR, REQUIRED, key


class QkNorm(StrEnum):
    """Extents of the RMSNorm of queries and keys."""

    none = "none"
    head = "head"
    head_after_rope = "head_after_rope"
    full = "full"


class AttentionBias(StrEnum):
    """Projections with a bias."""

    none = "none"
    qkv = "qkv"
    all = "all"


@dataclass
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071); null factors follow Hugging Face's ``rope_scaling``."""

    factor: float = key(REQUIRED, "How many times longer the context becomes.", customary="4 to 40", ge=1)
    original_max_seq_len: int = key(
        REQUIRED,
        "Context length before the extension, in tokens.",
        customary="the max_seq_len that the weights were trained with",
        ge=1,
        renamed_from=("original_max_position_embeddings", "original_seq_len"),
    )
    beta_fast: float = key(32.0, "Rotations over the original context from which frequencies stay as they are.", gt=0)
    beta_slow: float = key(1.0, "Rotations up to which frequencies are divided by the factor.", gt=0)
    mscale: float | None = key(None, "DeepSeek's factor in the magnitude of cosines and sines.", gt=0)
    mscale_all_dim: float | None = key(None, "DeepSeek's factor in the softmax scale.", gt=0)
    attention_factor: float | None = key(
        None, "Magnitude of cosines and sines; null takes it from the other factors.", gt=0, le=MAX_FACTOR
    )
    truncate: bool = key(True, "The ramp between the frequencies of the two betas begins and ends at whole indices.")


@dataclass
class Llama3RopeConfig:
    """Context extension of Llama 3.1 and later, whose ``rope_type`` is ``llama3``."""

    factor: float = key(REQUIRED, "How many times longer the context becomes.", customary="8 or 32", ge=1)
    original_max_seq_len: int = key(
        8192,
        "Context length before the extension, in tokens.",
        ge=1,
        renamed_from=("original_max_position_embeddings",),
    )
    low_freq_factor: float = key(1.0, "Rotations up to which frequencies are divided by the factor.", gt=0)
    high_freq_factor: float = key(4.0, "Rotations from which frequencies stay as they are.", gt=0)


@dataclass
class LongRopeConfig:
    """Context extension by LongRoPE (arXiv 2402.13753), which has other frequencies for longer sequences."""

    original_max_seq_len: int = key(
        REQUIRED,
        "Longest sequence, in tokens, with the short factors; a longer one has the long factors at all positions.",
        customary="the max_seq_len that the weights were trained with",
        ge=1,
        renamed_from=("original_max_position_embeddings",),
    )
    short_factors: list[float] = key(
        REQUIRED, "Divisors of the frequencies, one for each pair that turns.", customary="1 to 3", gt=0
    )
    long_factors: list[float] = key(
        REQUIRED, "The same, of longer sequences.", customary="1 for the fastest to 60 for the slowest", gt=0
    )
    short_magnitude: float = key(
        1.0, "Magnitude of cosines and sines.", gt=0, le=MAX_FACTOR, renamed_from=("short_mscale",)
    )
    long_magnitude: float = key(
        1.0, "The same, of longer sequences.", gt=0, le=MAX_FACTOR, renamed_from=("long_mscale",)
    )


class IndexerStage(StrEnum):
    """Stages of training a sparse attention."""

    frozen = "frozen"
    warm_up = "warm_up"
    sparse = "sparse"


@dataclass
class IndexerConfig:
    """Sparse attention of DeepSeek-V3.2: the keys that a query sees are chosen by narrow heads of their own."""

    top_k: int = key(
        2048,
        "Keys that a query sees; shorter sequences are dense.",
        ge=1,
        renamed_from=("index_topk",),
    )
    n_heads: int = key(64, "Heads that score keys.", ge=1, renamed_from=("index_n_heads",))
    head_dim: int = key(
        128, "Width of such a head; more than qk_rope_head_dim.", ge=2, renamed_from=("index_head_dim",)
    )
    stage: IndexerStage = key(
        IndexerStage.frozen,
        "What trains: warm_up these heads alone, beside dense attention; sparse all; frozen all but these heads.",
        architecture=False,
    )
    loss_weight: float = key(
        1.0,
        "Weight of the divergence of their choice from attention, summed over layers.",
        gt=0,
        le=MAX_FACTOR,
        architecture=False,
    )


@dataclass
class AttentionConfig:
    """Keys that every attention kind has; the keys of one kind are in its subclass."""

    kind: str = key(
        "gqa",
        "Attention kind; it decides the other keys of this mapping.",
        table="attention_kinds",
        renamed_from=("attn_type",),
        other_values={"grouped_query_attention": "gqa", "multihead_attention": "gqa"},
    )
    n_heads: int = key(
        REQUIRED, "Query heads.", customary="d_model / 128", ge=1, renamed_from=("num_attention_heads", "n_head")
    )
    rope_theta: float = key(
        10000.0,
        "Base of the rotary position embedding.",
        gt=0,
        renamed_from=("rope_base", "rotary_emb_base", "rotary_base"),
    )
    yarn: YarnConfig | None = key(
        None, "Context extension; null leaves the frequencies as they are.", renamed_from=("rope_scaling",)
    )

    llama3_rope: Llama3RopeConfig | None = key(
        None, "Context extension of Llama 3.1 and later; null leaves the frequencies as they are."
    )

    longrope: LongRopeConfig | None = key(
        None, "Context extension by LongRoPE; null leaves the frequencies as they are."
    )

    sinks: bool = key(
        False,
        "Each head has a learned logit in the softmax's denominator, so that it may attend to nothing.",
        renamed_from=("learned_sinks", "attention_sinks"),
    )

    def rotary_dim(self, d_model: int) -> int:
        """Width of the part of a head that rotary embeddings turn."""
        return d_model // self.n_heads

    def projection_widths(self, d_model: int) -> tuple[int, int]:
        """Widths of all heads' queries, and of all heads' keys."""
        return d_model, d_model

    @property
    def window(self) -> int | None:
        """Tokens a position sees, itself included; None if it sees all before it."""
        return None

    def window_of(self, block: int) -> int | None:
        """Give the window of one block, counted from 0; the modules of multi-token prediction come last."""
        return self.window

    def is_rotated(self, block: int) -> bool:
        """Tell if one block, counted as in :meth:`window_of`, has a rotary embedding."""
        return True

    def rope_of(self, window: int | None) -> AttentionConfig:
        """Give the attention with the rotary embedding of blocks with this window."""
        return self

    @property
    def trained_indexer(self) -> IndexerConfig | None:
        """The indexer of sparse attention, where its heads train."""
        return None


@dataclass
class GqaConfig(AttentionConfig):
    """Grouped-query attention (arXiv 2305.13245); ``n_kv_heads == n_heads`` is multi-head attention."""

    n_kv_heads: int = key(
        REQUIRED,
        "Key and value heads; divides n_heads.",
        customary="4 or 8, or as many as n_heads",
        ge=1,
        renamed_from=("num_key_value_heads", "kv_n_heads", "num_query_groups"),
    )
    head_dim: int | None = key(None, "Width of a head; null is d_model / n_heads.", ge=2, renamed_from=("kv_channels",))
    qk_norm: QkNorm = key(
        QkNorm.none,
        "RMSNorm of queries and keys: over each head, before or after its rotation, or over all heads together.",
        renamed_from=("use_qk_norm", "qk_ln"),
    )
    bias: AttentionBias = key(
        AttentionBias.none, "Which projections have a bias.", renamed_from=("attention_bias", "qkv_bias")
    )
    rotary_fraction: float = key(
        1.0,
        "Share of each head, from its beginning, that rotary embeddings turn.",
        gt=0,
        le=1,
        renamed_from=("partial_rotary_factor", "rotary_pct", "rotary_percent"),
    )
    rotary_interleaved: bool = key(
        False,
        "Elements 2i and 2i + 1 of a head turn together, not i and i + half the width.",
        renamed_from=("rope_interleaved", "rope_interleave"),
    )
    softmax_scale: float | None = key(
        None,
        "Factor of the products of queries and keys; null is head_dim ** -0.5.",
        gt=0,
        le=MAX_FACTOR,
        renamed_from=("attention_multiplier", "attn_scale"),
    )
    clip_qkv: float | None = key(None, "Clamps queries, keys and values to [-clip_qkv, clip_qkv].", gt=0)
    output_gate: bool = key(
        False, "Multiply each head's output by the sigmoid of a gate of its width, which a wider q_proj gives."
    )
    sliding_window: int | None = key(
        None,
        "Tokens a position sees, itself included; null sees all before it.",
        ge=1,
        renamed_from=("sliding_window_size",),
    )
    sliding_window_layers: list[int] | None = key(
        None,
        "Blocks (from 0) that have the window, if not all; the others see all before.",
        ge=0,
        instead_of=dict.fromkeys(
            ("layer_types", "max_window_layers"),
            "model.attention.sliding_window_layers lists the blocks that have the window",
        ),
    )

    sliding_window_rope_theta: float | None = key(
        None,
        "Base of the rotary embedding of the blocks with a window, which no extension changes then; null is that of "
        "the others, extended as theirs.",
        gt=0,
        renamed_from=("rope_local_base_freq", "swa_rope_theta"),
    )
    unrotated_layers: list[int] = key(
        list, "Blocks (from 0) without a rotary embedding, whose queries and keys have no position.", ge=0
    )

    def head_width(self, d_model: int) -> int:
        """Width of a head."""
        return self.head_dim or d_model // self.n_heads

    def rotary_dim(self, d_model: int) -> int:
        return int(self.head_width(d_model) * self.rotary_fraction)

    def projection_widths(self, d_model: int) -> tuple[int, int]:
        return self.n_heads * self.head_width(d_model), self.n_kv_heads * self.head_width(d_model)

    @property
    def window(self) -> int | None:
        return self.sliding_window

    def window_of(self, block: int) -> int | None:
        layers = self.sliding_window_layers
        return self.sliding_window if layers is None or block in layers else None

    def is_rotated(self, block: int) -> bool:
        return block not in self.unrotated_layers

    def rope_of(self, window: int | None) -> AttentionConfig:
        theta = self.sliding_window_rope_theta
        if window is None or theta is None:
            return self
        return replace(self, rope_theta=theta, yarn=None, llama3_rope=None, longrope=None)


@dataclass
class MlaConfig(AttentionConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in the published weights' interleaved RoPE."""

    kind: str = key("mla", "Attention kind; it decides the other keys of this mapping.", table="attention_kinds")
    q_lora_rank: int | None = key(None, "Width of the compressed queries; null does not compress them.", ge=1)
    kv_lora_rank: int = key(512, "Width of the compressed keys and values.", ge=1)
    qk_nope_head_dim: int = key(128, "Width of a query's and key's part without position.", ge=1)
    qk_rope_head_dim: int = key(64, "Width of the part with position; the keys of all heads share it.", ge=2)
    v_head_dim: int = key(128, "Width of a value.", ge=1)
    indexer: IndexerConfig | None = key(None, "Sparse attention; null sees all keys. It needs q_lora_rank.")

    def rotary_dim(self, d_model: int) -> int:
        return self.qk_rope_head_dim

    @property
    def trained_indexer(self) -> IndexerConfig | None:
        indexer = self.indexer
        return None if indexer is None or indexer.stage == IndexerStage.frozen else indexer
