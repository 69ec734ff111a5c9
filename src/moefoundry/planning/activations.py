"""Estimate of the memory of activations, from the tensors that each operation keeps for its backward pass.

All figures are bytes a token; ``c`` is the bytes of the compute dtype. Without checkpointing a block keeps

    each norm    c D                   its input
    attention    c (D + 2 q + 2 kv)    its input, queries, keys, values and output; 4 H for the sums of the softmax
    dense FFN    c (D + 3 F)           its input, the two inputs of SwiGLU and its product
    MoE layer    c D + 8 E             the tokens; logits and scores
                 c K (D + 3 F)         rows before and inside the experts; 36 K for their order
                 3 c F_shared          shared experts
                 c E                   weights by expert, where experts have biases

with q, kv the widths of all heads' queries and keys, H heads (MLA keeps its compressed vectors, and wider keys and
values). With ``fp8.recipe: deepseek_v3`` inputs of products and of SwiGLU take 129/128 bytes an element, and SwiGLU's
product is not kept; the projection after attention keeps its input in 193/128 bytes, beside attention's own copy; MLA
keeps compressed vectors only, and its input if queries are not compressed. ``full`` keeps a block's input, c D, the
order of its rows, and one block at a time as above. ``selective`` keeps that input and order, and the results of
products, attention and exchanges. While a block runs backward, the gradients of its widest part exist, too.

Linear attention keeps c D and what its projections, convolution, norm and gate read, as in the code below, and inside
the gated delta rule

    kernels        c (C + 2 k + 64 H) + 8 H       inputs, normed queries and keys, a chunk's triangle
    PyTorch        4 G (8 K + 130) + 4 H (4 K + 4 V + K V / 64 + 259), as measured

with G and H heads of keys and values, K and V wide, k all keys, C all channels. The kernels are assumed with BF16
unless the recipe's backend is torch. Norms and attention are assumed to be one kernel each, as on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config import (
    ActivationCheckpointing,
    GqaConfig,
    LinearAttentionConfig,
    LinearBackend,
    MlaConfig,
    ModelConfig,
    QkNorm,
)

FP32 = 4
CHUNK = 64
E4M3_ROW, E5M6_ROW = 129 / 128, 193 / 128
ORDER_BYTES = 16
"""Bytes of a slot in the order of rows: its row, and the row's slot. Checkpointing does not drop the order, which also
has 8 bytes of a token. Exchanges have their own orders, of at most as many slots: estimated as one more."""
INDEX_BYTES = 36
"""Bytes of a slot in all: its order, expert and weight, and the row's weight."""


@dataclass(frozen=True)
class Kept:
    """Bytes a token that one part of a block keeps.

    Attributes:
        all: Bytes without checkpointing.
        products: Bytes of the results of products, attention and exchanges: with ``selective``.
        gradients: Largest gradients that exist at a time in the backward pass.
        order: Bytes of the order of rows; kept in any mode.
    """

    all: float
    products: int
    gradients: int
    order: int = 0


@dataclass(frozen=True)
class BlockActivations:
    """Bytes a token of one block.

    Attributes:
        saved: Bytes from its forward pass to its backward pass.
        working: Further bytes in its backward pass.
    """

    saved: int
    working: int


def block_activations(
    cfg: ModelConfig,
    sparse: bool,
    mode: ActivationCheckpointing,
    c: int,
    exchanged: bool,
    fp8: bool = False,
    linear: bool = False,
) -> BlockActivations:
    """Estimate the activations of a block.

    Args:
        cfg: The recipe's ``model``.
        sparse: The block has an MoE layer, not a dense FFN.
        mode: The recipe's ``activation_checkpointing``.
        c: Bytes of the compute dtype.
        exchanged: Experts are on several ranks.
        fp8: The FP8 recipe is ``deepseek_v3``.
        linear: The block has linear attention.
    """
    attention = _linear_attention(cfg.d_model, cfg.linear_attention, c, fp8) if linear else _attention(cfg, c, fp8)
    width = cfg.d_model
    ffn = _moe(cfg, c, exchanged, fp8) if sparse else _dense(width, cfg.dense_width, c, fp8)
    everything = attention.all + ffn.all + 2 * c * width
    gradients = max(attention.gradients, ffn.gradients)
    if mode == ActivationCheckpointing.none:
        return BlockActivations(round(everything), gradients)
    kept = ffn.order
    if mode == ActivationCheckpointing.selective:
        kept += attention.products + ffn.products
    return BlockActivations(c * width + kept, round(everything) - kept + gradients)


def _attention(cfg: ModelConfig, c: int, fp8: bool) -> Kept:
    if isinstance(cfg.attention, MlaConfig):
        return _latent_attention(cfg.d_model, cfg.attention, c, fp8)
    width, heads = cfg.d_model, cfg.attention.n_heads
    queries, keys = cfg.attention.projection_widths(width)
    norms = isinstance(cfg.attention, GqaConfig) and cfg.attention.qk_norm != QkNorm.none
    inner_norms = c * (queries + keys) if norms else 0
    gates = c * queries if isinstance(cfg.attention, GqaConfig) and cfg.attention.output_gate else 0
    inside = c * (2 * queries + 2 * keys) + FP32 * heads
    return Kept(
        inside + inner_norms + 2 * gates + (E4M3_ROW * width + E5M6_ROW * queries if fp8 else c * width),
        c * width + inside + gates,
        c * (2 * queries + 2 * keys),
    )


def _linear_attention(width: int, cfg: LinearAttentionConfig | None, c: int, fp8: bool) -> Kept:
    assert cfg is not None, "a block has linear attention only where the recipe declares it"
    keys, values = cfg.n_key_heads * cfg.key_head_dim, cfg.n_value_heads * cfg.value_head_dim
    channels, heads = 2 * keys + values, cfg.n_value_heads
    products = c * (width + channels + values + 2 * heads)
    inputs = E4M3_ROW * width + E5M6_ROW * values if fp8 else c * (width + values)
    outside = inputs + c * (2 * channels + 3 * values + 2 * heads)  # convolution and SiLU; norm and gate
    if cfg.backend == LinearBackend.torch or c == FP32:
        of_key_head = 8 * cfg.key_head_dim + 2 * CHUNK + 2
        state = cfg.key_head_dim * cfg.value_head_dim / CHUNK  # one a chunk
        of_head = 4 * (cfg.key_head_dim + cfg.value_head_dim + CHUNK) + state + 3
        views = FP32 * values if c == FP32 else 0  # of the convolution's output, which its queries and keys keep
        inside = FP32 * (cfg.n_key_heads * of_key_head + heads * of_head) + views
    else:
        inside = c * (channels + 2 * keys + CHUNK * heads) + 2 * FP32 * heads
    return Kept(outside + inside, products, c * (2 * channels + 2 * values))


def _latent_attention(width: int, cfg: MlaConfig, c: int, fp8: bool) -> Kept:
    queries = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    key_values, out = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.n_heads * cfg.v_head_dim
    latents = (cfg.q_lora_rank or 0) + cfg.kv_lora_rank
    sums = FP32 * cfg.n_heads
    products = c * (width + latents + cfg.qk_rope_head_dim + queries + key_values + out) + sums
    gradients = c * (2 * queries + key_values + out)
    if fp8:  # queries, keys and values are computed again
        source = latents if cfg.q_lora_rank is not None else latents + width  # input of the queries' projection
        kept = E4M3_ROW * width + c * (source + cfg.qk_rope_head_dim + out) + E5M6_ROW * out + sums
        return Kept(kept, products, gradients + c * (2 * queries + key_values))
    # values are a part of key_values; latents are kept by their norms and by the projections up
    return Kept(c * (width + 2 * queries + key_values + out + 2 * latents) + sums, products, gradients)


def _dense(width: int, hidden: int, c: int, fp8: bool) -> Kept:
    kept = E4M3_ROW * (width + 2 * hidden) if fp8 else c * (width + 3 * hidden)
    return Kept(kept, c * (width + 2 * hidden), c * (2 * width + 3 * hidden))


def _moe(cfg: ModelConfig, c: int, exchanged: bool, fp8: bool) -> Kept:
    moe, width, hidden = cfg.moe, cfg.d_model, cfg.moe.expert_hidden_size
    shared = _dense(width, moe.num_shared_experts * hidden, c, fp8)
    row = _dense(width, hidden, c, fp8).all + INDEX_BYTES
    biases = c if moe.projection_bias else 0
    row_products = moe.top_k * c * (width + 2 * hidden + (2 * width if exchanged else 0))
    return Kept(
        shared.all + (2 * FP32 + biases) * moe.num_experts + moe.top_k * row + 8,
        biases * width + (shared.products if moe.num_shared_experts else 0) + FP32 * moe.num_experts + row_products,
        max(shared.gradients, 2 * c * moe.top_k * (width + hidden)),
        (moe.top_k * ORDER_BYTES + 8) * (2 if exchanged else 1),
    )
