"""Backward stages of attention, by :mod:`moefoundry.planning.stages`.

q and kv are the widths of all heads' queries and keys, H the heads. Attention is one kernel, as on GPUs; so its inputs,
its output and the sums of the softmax, 4 H, are all that it keeps.

With ``fp8.recipe: deepseek_v3`` a projection keeps its input in 129/128 bytes, the one after attention in 193/128
beside attention's own copy; MLA keeps compressed vectors only, and its input if queries are not compressed.
"""

from __future__ import annotations

from dataclasses import replace

from moefoundry.config import GqaConfig, LinearAttentionConfig, LinearBackend, MlaConfig, ModelConfig, QkNorm
from moefoundry.ops.sizes import DELTA_CHUNK
from moefoundry.planning.indexer_stages import IndexerBytes
from moefoundry.planning.stages import ATTENTION, Stage, norm
from moefoundry.planning.units import FP32

E4M3_ROW, E5M6_ROW = 129 / 128, 193 / 128
NO_INDEXER = IndexerBytes()


def attention_stages(
    cfg: ModelConfig,
    c: int,
    fp8: bool,
    linear: bool,
    masked: bool,
    alone: bool,
    indexer: IndexerBytes = NO_INDEXER,
    seq_len: int = 0,
) -> list[Stage]:
    """List the stages of a block's attention, from its output to its input.

    Where it takes a mask, keys and values are copied for every query head, and in fp32 the mask of ``seq_len`` values a
    token is kept. FP8's recomputation inside MLA is ``alone``,
    without that of whole blocks.
    """
    if linear:
        assert cfg.linear_attention is not None, "a block has linear attention only where the recipe declares it"
        return _linear(cfg.d_model, cfg.linear_attention, c, fp8)
    if isinstance(cfg.attention, MlaConfig):
        stages = _latent(cfg.d_model, cfg.attention, c, fp8, fp8 and alone)
        return _with_indexer(stages, indexer)
    return _grouped_query(cfg, c, fp8, masked, seq_len)


def rotated(width: int, c: int) -> float:
    """Bytes beside the gradient of a rotated vector while its rotation runs backward, in fp32."""
    return 3 * FP32 * width + (FP32 * width if c < FP32 else 0)


def _grouped_query(cfg: ModelConfig, c: int, fp8: bool, masked: bool, seq_len: int) -> list[Stage]:
    attention, width, heads = cfg.attention, cfg.d_model, cfg.attention.n_heads
    queries, keys = attention.projection_widths(width)
    gqa = attention if isinstance(attention, GqaConfig) else None
    gates = queries if gqa is not None and gqa.output_gate else 0
    turned = attention.rotary_dim(width) * heads
    clamped = c if gqa is not None and gqa.clip_qkv is not None else 0  # bytes of an element before it is clamped
    last = Stage(E5M6_ROW * queries if fp8 else 0, 2 * c * queries, c * width, ATTENTION, 0.25)
    mask = FP32 * seq_len if masked and c == FP32 and not attention.sinks else 0  # the kernel without one is for BF16
    core = Stage(
        saved=c * (2 * queries + 2 * (queries if masked else keys)) + FP32 * heads + mask,
        held=c * (2 * queries + 2 * max(queries, keys)),
        kept=c * queries + FP32 * heads,
    )
    stages = [last]
    if gates:  # the gates, their sigmoids, and the product
        stages.append(Stage(2 * c * gates, 4 * c * queries))
    stages += [core, Stage(clamped * keys, c * (queries + 2 * keys + width), c * keys, ATTENTION, 0.25)]
    for part, others, gated in ((keys, queries, 0), (queries, 0, gates)):  # others: gradients that wait
        rotation = rotated(turned * part // queries, c)
        stages.append(Stage(clamped * part, c * (others + 2 * part + width) + rotation))
        if gqa is not None and gqa.qk_norm != QkNorm.none:
            normed = norm(part, c)
            stages.append(Stage(normed.saved, normed.held + c * (others + width)))
        stages.append(Stage(0, c * (others + part + gated + 2 * width), c * (part + gated), ATTENTION, 0.25))
    stages.append(Stage(E4M3_ROW * width if fp8 else c * width, 0))
    return stages


def _latent(width: int, cfg: MlaConfig, c: int, fp8: bool, again: bool) -> list[Stage]:
    queries = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    key_values, out = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.n_heads * cfg.v_head_dim
    latents, rope = (cfg.q_lora_rank or 0) + cfg.kv_lora_rank, cfg.qk_rope_head_dim
    sums, turned = FP32 * cfg.n_heads, rotated(cfg.n_heads * cfg.qk_rope_head_dim, c)
    inside = c * (2 * queries + key_values)  # queries and keys; values are a part of key_values
    last = Stage(E5M6_ROW * out if fp8 else 0, 2 * c * out, c * width, ATTENTION, 0.25)
    core = Stage(
        saved=c * out + sums + (0 if again else inside),
        held=c * (2 * queries + 2 * out + key_values) + (inside if again else 0),
        kept=c * out + sums,
    )
    up = Stage(
        saved=c * (latents + rope) if again else (c + (E4M3_ROW if fp8 else c)) * latents,
        held=c * (2 * queries + 2 * key_values) + turned,
        kept=c * (queries + key_values),
        weights=ATTENTION,
        share=0.5,
    )
    source = c * width if again and cfg.q_lora_rank is None else 0  # input of the queries' projection
    down = Stage(
        saved=(E4M3_ROW * width if fp8 else c * width) + source,
        held=c * (latents + rope + 2 * width),
        kept=c * (latents + rope),
        weights=ATTENTION,
        share=0.25,
    )
    return [last, core, up, down]


def _with_indexer(stages: list[Stage], indexer: IndexerBytes) -> list[Stage]:
    """Add to the stages from the output on, the second of which is attention itself."""
    last, core, *others = stages
    core = replace(core, saved=core.saved + indexer.mask)
    learning = [Stage(indexer.factors, indexer.learning)] if indexer.learning else []
    return [last, *learning, core, *others]


def _linear(width: int, cfg: LinearAttentionConfig, c: int, fp8: bool) -> list[Stage]:
    """List the stages of the gated delta rule; its kernels are assumed with BF16 unless the backend is torch."""
    keys, values = cfg.n_key_heads * cfg.key_head_dim, cfg.n_value_heads * cfg.value_head_dim
    channels, heads = 2 * keys + values, cfg.n_value_heads
    if cfg.backend == LinearBackend.torch or c == FP32:
        of_key_head = 8 * cfg.key_head_dim + 2 * DELTA_CHUNK + 2
        state = cfg.key_head_dim * cfg.value_head_dim / DELTA_CHUNK  # one a chunk
        of_head = 4 * (cfg.key_head_dim + cfg.value_head_dim + DELTA_CHUNK) + state + 3
        views = FP32 * values if c == FP32 else 0  # of the convolution's output, which its queries and keys keep
        inside = FP32 * (cfg.n_key_heads * of_key_head + heads * of_head) + views
    else:
        inside = c * (channels + 2 * keys + DELTA_CHUNK * heads) + 2 * FP32 * heads
    return [
        Stage(E5M6_ROW * values if fp8 else c * values, 2 * c * values, c * width, ATTENTION, 0.25),
        Stage(3 * c * values, 5 * c * values, c * values),  # norm and gate
        Stage(inside, c * (2 * channels + values), 0),
        Stage(2 * c * channels, 3 * c * channels, c * channels),  # convolution and SiLU
        Stage(
            (E4M3_ROW if fp8 else c) * width + 2 * c * heads,
            c * (channels + values + 2 * width),
            2 * c * heads,
            ATTENTION,
            0.75,
        ),
    ]
