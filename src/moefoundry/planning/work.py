"""Work of a forward pass, a token: FLOPs of products, bytes that other operations move.

A product of a token with a weight matrix is 2 FLOPs an element. Bytes are those that kernels read and write in the
device's memory, with one kernel each for a norm, a residual sum, rotary embeddings, attention and SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moefoundry.config import MlaConfig, ModelConfig
from moefoundry.model.linear_attention import GatedDeltaNet
from moefoundry.model.transformer import Block, MoETransformer
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.gated_delta_rule.chunked import CHUNK

ROUTER_BYTES = 40
"""Bytes of an expert's score of a token, over all that routing and its losses read and write."""


@dataclass(frozen=True)
class Work:
    """Work of a token.

    Attributes:
        linear: FLOPs of products with dense weights.
        experts: FLOPs of products with routed experts' weights.
        attention: FLOPs of queries with keys, and of the sum of values.
        moved: Bytes that other operations move.
    """

    linear: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    moved: float = 0.0

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return self.linear + self.experts + self.attention


def block_work(cfg: ModelConfig, block: Block, seq_len: int, c: int) -> Work:
    """Count the work of one block.

    Args:
        cfg: The recipe's ``model``.
        block: The block, on any device.
        seq_len: Tokens of a sequence.
        c: Bytes of an element in the compute dtype.
    """
    width, widths = cfg.d_model, _attention_widths(cfg)
    attention = 2 * sum(widths) * _positions_seen(seq_len, block.kind.window)
    if isinstance(block.attention, GatedDeltaNet):
        widths, attention = block.attention.widths, _linear_attention(block.attention)
    sparse = isinstance(block.ffn, MoELayer)
    routed = 3 * cfg.moe.expert_hidden_size * width if sparse else 0
    biases = cfg.moe.num_experts * width if sparse and cfg.moe.projection_bias else 0  # of down, weighted
    moved = 10 * c * width + 4 * c * sum(widths)
    if sparse:
        shared = cfg.moe.num_shared_experts * cfg.moe.expert_hidden_size
        moved += c * (cfg.moe.top_k * (4 * width + 3 * cfg.moe.expert_hidden_size) + 3 * shared)
        moved += ROUTER_BYTES * cfg.moe.num_experts
    else:
        moved += 3 * c * cfg.dense_width
    return Work(
        linear=2 * _dense_elements(block),
        experts=2 * (routed * cfg.moe.top_k + biases),
        attention=attention,
        moved=moved,
    )


def head_work(model: MoETransformer) -> Work:
    """Count the work of the output head, once for the next token and once for each module of multi-token prediction."""
    heads = 1 + len(model.mtp)
    projections = sum(module.proj.weight.numel() for module in model.mtp)
    return Work(linear=2 * (heads * model.lm_head.weight.numel() + projections))


def _dense_elements(block: Block) -> int:
    """Count the elements of the weight matrices that every token meets."""
    experts = block.ffn.experts if isinstance(block.ffn, MoELayer) else nn.Module()
    routed = {id(parameter) for parameter in experts.parameters()}
    return sum(p.numel() for p in block.parameters() if p.dim() == 2 and id(p) not in routed)


def _linear_attention(layer: GatedDeltaNet) -> int:
    """Count the FLOPs of a token in the gated delta rule by chunks, and in the convolution before it.

    A head multiplies keys and queries with the chunk's keys, solves the chunk's system, sums the chunk's values, and
    reads the state twice and adds to it once.
    """
    keys, values = layer.head_dims
    of_chunk, of_state = CHUNK * (4 * keys + (keys + values) + 2 * values), 6 * keys * values
    return layer.decay.A_log.numel() * (of_chunk + of_state) + 2 * layer.conv.weight.numel()


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


def _positions_seen(seq_len: int, window: int | None) -> float:
    """Mean number of positions that a position sees, itself included."""
    seen = min(seq_len, window or seq_len)
    return (seen * (seen + 1) / 2 + (seq_len - seen) * seen) / seq_len


def flops_per_token(model: MoETransformer, seq_len: int) -> float:
    """Count the FLOPs of a token, forward and backward, without recomputation; ``model`` may be on meta."""
    works = [block_work(model.cfg, block, seq_len, c=4) for block in model.blocks]
    return 3 * (sum(work.flops for work in works) + head_work(model).flops)
