"""Work of a forward pass, a token: FLOPs of products, bytes that other operations move.

A product of a token with a weight matrix is 2 FLOPs an element. Bytes are those that kernels read and write in the
device's memory, with one kernel each for a norm, a residual sum, rotary embeddings, attention and SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moefoundry.config import LinearAttentionConfig, MlaConfig, ModelConfig
from moefoundry.ops.sizes import DELTA_CHUNK
from moefoundry.planning.weights import Weight, all_blocks

ROUTER_BYTES = 40
"""Bytes of an expert's score of a token, over all that routing and its losses read and write."""


@dataclass(frozen=True)
class Work:
    """Work of a token.

    Attributes:
        linear: FLOPs of products with dense weights.
        experts: FLOPs of products with routed experts' weights.
        attention: FLOPs of queries with keys, and of the sum of values.
        masked: FLOPs of the same that are computed by a kernel which takes a mask: of all pairs, seen or not.
        shared: Of ``linear``, the FLOPs of shared experts.
        moved: Bytes that other operations move.
    """

    linear: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    masked: float = 0.0
    shared: float = 0.0
    moved: float = 0.0

    @property
    def flops(self) -> float:
        """FLOPs of all products that the model is made of."""
        return self.linear + self.experts + self.attention

    def times(self, factor: float) -> Work:
        """Multiply all of it."""
        return Work(**{name: factor * value for name, value in asdict(self).items()})


def block_work(cfg: ModelConfig, index: int, weights: Sequence[Weight], seq_len: int, c: int) -> Work:
    """Count the work of one block.

    Args:
        cfg: The recipe's ``model``.
        index: Number of the block.
        weights: Its parameters, with adapters.
        seq_len: Tokens of a sequence.
        c: Bytes of an element in the compute dtype.
    """
    width, widths = cfg.d_model, _attention_widths(cfg)
    window = cfg.attention.window_of(index)
    attention = 2 * sum(widths) * _positions_seen(seq_len, window)
    masked = 2 * sum(widths) * seq_len if takes_mask(cfg, index, seq_len) else 0.0
    if cfg.is_linear(index):
        assert cfg.linear_attention is not None, "checked by is_linear"
        widths, attention = _linear_widths(cfg.linear_attention), _linear_attention(cfg.linear_attention)
        masked = 0.0
    sparse = not cfg.is_dense(index)
    routed = 3 * cfg.moe.expert_hidden_size * width if sparse else 0
    biases = cfg.moe.num_experts * width if sparse and cfg.moe.projection_bias else 0  # of down, weighted
    moved = 10 * c * width + 4 * c * sum(widths)
    shared = cfg.moe.num_shared_experts * cfg.moe.expert_hidden_size if sparse else 0
    if sparse:
        moved += c * (cfg.moe.top_k * (4 * width + 3 * cfg.moe.expert_hidden_size) + 3 * shared)
        moved += ROUTER_BYTES * cfg.moe.num_experts
    else:
        moved += 3 * c * cfg.dense_width
    every_token = sum(weight.numel for weight in weights if len(weight.shape) == 2 and not weight.of_experts)
    return Work(
        linear=2 * every_token,
        experts=2 * (routed * cfg.moe.top_k + biases),
        attention=attention,
        masked=masked,
        shared=2 * 3 * shared * width,
        moved=moved,
    )


def head_work(cfg: ModelConfig) -> Work:
    """Count the work of the output head, once for the next token and once for each module of multi-token prediction."""
    heads = 1 + cfg.mtp.depth
    projections = cfg.mtp.depth * 2 * cfg.d_model * cfg.d_model
    return Work(linear=2 * (heads * cfg.vocab_size * cfg.d_model + projections))


def _linear_widths(cfg: LinearAttentionConfig) -> Sequence[int]:
    """Give the widths of all heads' queries, keys and values."""
    keys = cfg.n_key_heads * cfg.key_head_dim
    return keys, keys, cfg.n_value_heads * cfg.value_head_dim


def _linear_attention(cfg: LinearAttentionConfig) -> int:
    """Count the FLOPs of a token in the gated delta rule by chunks, and in the convolution before it.

    A head multiplies keys and queries with the chunk's keys, solves the chunk's system, sums the chunk's values, and
    reads the state twice and adds to it once.
    """
    keys, values = cfg.key_head_dim, cfg.value_head_dim
    of_chunk, of_state = DELTA_CHUNK * (4 * keys + (keys + values) + 2 * values), 6 * keys * values
    return cfg.n_value_heads * (of_chunk + of_state) + 2 * sum(_linear_widths(cfg)) * cfg.conv_width


def _attention_widths(cfg: ModelConfig) -> Sequence[int]:
    """Give the widths of all heads' queries, and of their values as queries see them."""
    attention = cfg.attention
    if isinstance(attention, MlaConfig):
        return (
            attention.n_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim),
            attention.n_heads * attention.v_head_dim,
        )
    queries, _ = attention.projection_widths(cfg.d_model)
    return queries, queries


def takes_mask(cfg: ModelConfig, index: int, seq_len: int) -> bool:
    """Tell if a block's attention needs more than the plain causal kernels: a window, sinks, or documents apart."""
    window = cfg.attention.window_of(index)
    return (window is not None and window < seq_len) or cfg.attention.sinks or cfg.document_masking


def _positions_seen(seq_len: int, window: int | None) -> float:
    """Mean number of positions that a position sees, itself included."""
    seen = min(seq_len, window or seq_len)
    return (seen * (seen + 1) / 2 + (seq_len - seen) * seen) / seq_len


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Count the FLOPs of a token, forward and backward, without recomputation."""
    works = [block_work(cfg, index, weights, seq_len, c=4) for index, weights in enumerate(all_blocks(cfg))]
    return model_flops(works, head_work(cfg))


def model_flops(blocks: Sequence[Work], head: Work) -> float:
    """Count the FLOPs of a token, forward and backward, from the work of a forward pass."""
    return 3 * (sum(work.flops for work in blocks) + head.flops)
