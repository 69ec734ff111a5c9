"""How much memory activations take: an estimate, from the tensors that each operation keeps for its backward pass.

Bytes a token, ``c`` those of the compute dtype. Without checkpointing a block keeps

    each norm    4 D                   its input, in fp32
    attention    c (D + 2 q + 2 kv)    its input, queries, keys, values and output; 4 H for the sums of the softmax
    dense FFN    c (D + 3 F)           its input, the two inputs of SwiGLU and its product
    MoE layer    c D + 4 D + 8 E       the tokens, in fp32 too where c < 4 (for the gate); logits and scores
                 c K (2 D + 3 F)       rows before, inside and after the experts; 32 K for where they go
                 3 c F_shared          shared experts

with q, kv the widths of all heads' queries and keys, H heads (MLA keeps its compressed vectors, and wider keys and
values). ``full`` keeps a block's input, c D, the order of its rows, and one block at a time as above. ``selective``
keeps that input and order, and what products, attention and exchanges return. While a block runs backward, gradients of
its widest part exist beside.

Norms and attention are taken to be one kernel each, as on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config import ActivationCheckpointing, GqaConfig, MlaConfig, ModelConfig, QkNorm

FP32 = 4
ORDER_BYTES = 16
"""Of a slot: its row, and the row's slot. They belong to no operation, and checkpointing leaves them."""
INDEX_BYTES = 32
"""Of a slot: those, its expert and its weight."""


@dataclass(frozen=True)
class Kept:
    """Bytes a token of one part of a block.

    Attributes:
        all: What it keeps without checkpointing.
        products: Of what products, attention and exchanges return: what ``selective`` keeps.
        gradients: Largest gradients that exist at a time in its backward pass.
        order: Of where rows go; kept in any mode.
    """

    all: int
    products: int
    gradients: int
    order: int = 0


@dataclass(frozen=True)
class BlockActivations:
    """Bytes a token of one block.

    Attributes:
        saved: From its forward pass to its backward pass.
        working: In its backward pass, beside what it saved.
    """

    saved: int
    working: int


def block_activations(
    cfg: ModelConfig, sparse: bool, mode: ActivationCheckpointing, c: int, exchanged: bool
) -> BlockActivations:
    """Of a block of the model.

    Args:
        cfg: The model.
        sparse: Whether the block has an MoE layer, and not a dense FFN.
        mode: What the backward pass recomputes.
        c: Bytes of the compute dtype.
        exchanged: Whether experts are on several ranks.
    """
    attention = _attention(cfg, c)
    ffn = _moe(cfg, c, exchanged) if sparse else _dense(cfg.d_model, cfg.ffn_hidden_size, c)
    everything = attention.all + ffn.all + 2 * FP32 * cfg.d_model
    gradients = max(attention.gradients, ffn.gradients)
    if mode == ActivationCheckpointing.none:
        return BlockActivations(everything, gradients)
    kept = ffn.order
    if mode == ActivationCheckpointing.selective:
        kept += attention.products + ffn.products
    return BlockActivations(c * cfg.d_model + kept, everything - kept + gradients)


def _attention(cfg: ModelConfig, c: int) -> Kept:
    if isinstance(cfg.attention, MlaConfig):
        return _latent_attention(cfg.d_model, cfg.attention, c)
    assert isinstance(cfg.attention, GqaConfig), "the kinds of attention"
    width, heads = cfg.d_model, cfg.attention.n_heads
    head = cfg.attention.head_dim or width // heads
    queries, keys = heads * head, cfg.attention.n_kv_heads * head
    inner_norms = 0 if cfg.attention.qk_norm == QkNorm.none else FP32 * (queries + keys)
    kept = c * (width + 2 * queries + 2 * keys) + FP32 * heads
    return Kept(kept + inner_norms, kept, c * (2 * queries + 2 * keys))


def _latent_attention(width: int, cfg: MlaConfig, c: int) -> Kept:
    queries = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    key_values, out = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.n_heads * cfg.v_head_dim
    latents = (cfg.q_lora_rank or 0) + cfg.kv_lora_rank
    kept = c * (width + 2 * queries + key_values + out) + FP32 * cfg.n_heads  # values are a part of key_values
    products = c * (width + latents + cfg.qk_rope_head_dim + queries + key_values + out) + FP32 * cfg.n_heads
    return Kept(kept + (FP32 + c) * latents, products, c * (2 * queries + key_values + out))


def _dense(width: int, hidden: int, c: int) -> Kept:
    return Kept(c * (width + 3 * hidden), c * (width + 2 * hidden), c * (2 * width + 3 * hidden))


def _moe(cfg: ModelConfig, c: int, exchanged: bool) -> Kept:
    moe, width, hidden = cfg.moe, cfg.d_model, cfg.moe.expert_hidden_size
    shared = _dense(width, moe.num_shared_experts * hidden, c)
    gate = 2 * FP32 * moe.num_experts + (FP32 * width if c < FP32 else 0)
    rows = moe.top_k * (c * (2 * width + 3 * hidden) + INDEX_BYTES)
    row_products = moe.top_k * c * (width + 2 * hidden + (2 * width if exchanged else 0))
    return Kept(
        shared.all + gate + rows,
        (shared.products if moe.num_shared_experts else 0) + FP32 * moe.num_experts + row_products,
        max(shared.gradients, 2 * c * moe.top_k * (width + hidden)),
        moe.top_k * ORDER_BYTES * (2 if exchanged else 1),
    )
