"""Tiny models of each family, in several variants, and transformers' own with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from moefoundry.config import (
    AttentionBias,
    AttentionConfig,
    BalanceConfig,
    GqaConfig,
    IndexerConfig,
    InitConfig,
    LinearAttentionConfig,
    Llama3RopeConfig,
    LongRopeConfig,
    MlaConfig,
    ModelConfig,
    MoEConfig,
    MultipliersConfig,
    NormConfig,
    NormKind,
    NormPosition,
    QkNorm,
    RouterConfig,
    ScoreFunction,
    SparseMixerConfig,
    SwigluConfig,
    YarnConfig,
)
from moefoundry.conversion.families import FAMILIES, Piece
from moefoundry.model.transformer import MoETransformer
from tests.conversion.transformers5 import VOCAB, randomize

YARN = YarnConfig(factor=4.0, original_max_seq_len=32)
GQA = GqaConfig(n_heads=4, n_kv_heads=2)
MLA = MlaConfig(
    n_heads=4, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, rope_theta=5e4
)


def model_config(attention: AttentionConfig, n_layers: int = 2, **changes: object) -> ModelConfig:
    """No two sizes are equal, so that none can pass for another."""
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_layers": n_layers, "init": InitConfig(std=0.2)}
    return ModelConfig(attention=attention, **(sizes | changes))  # type: ignore[arg-type]


def dense(attention: AttentionConfig, **changes: object) -> ModelConfig:
    moe = MoEConfig(num_experts=1, top_k=1, expert_hidden_size=48)
    return model_config(attention, **({"n_dense_layers": 2, "ffn_hidden_size": 48, "moe": moe} | changes))


def sparse(attention: AttentionConfig, router: RouterConfig | None = None, **changes: object) -> ModelConfig:
    return model_config(attention, **({"n_dense_layers": 0, "moe": experts(router)} | changes))


def experts(router: RouterConfig | None = None, num_experts: int = 8, top_k: int = 3, shared: int = 0) -> MoEConfig:
    router = router or RouterConfig()
    return MoEConfig(
        num_experts=num_experts, top_k=top_k, expert_hidden_size=20, num_shared_experts=shared, router=router
    )


def gated(router: RouterConfig, shared: int) -> MoEConfig:
    return replace(experts(router, shared=shared), shared_expert_gate=True)


def ernie(shared: int = 0, **changes: object) -> ModelConfig:
    moe = replace(experts(shared=shared), balance=BalanceConfig(bias_update_rate=0.001))
    sizes = {"n_layers": 3, "n_dense_layers": 1, "ffn_hidden_size": 48, "moe": moe}
    return model_config(replace(GQA, rotary_interleaved=True), **(sizes | changes))


def deepseek(
    attention: AttentionConfig = MLA,
    shared: int = 1,
    num_groups: int = 1,
    top_k_groups: int = 1,
    normalize: bool = True,
    router: RouterConfig | None = None,
    **changes: object,
) -> ModelConfig:
    router = router or RouterConfig(ScoreFunction.sigmoid, normalize, 2.5, num_groups, top_k_groups)
    sizes = {"n_layers": 3, "n_dense_layers": 1, "ffn_hidden_size": 48, "moe": experts(router, shared=shared)}
    return model_config(attention, **(sizes | changes))


def afmoe(attention: GqaConfig, **changes: object) -> ModelConfig:
    return deepseek(attention, norm=NormConfig(position=NormPosition.both, eps=1e-5), **changes)


def hybrid(attention: AttentionConfig | None = None, shared: int = 1, **changes: object) -> ModelConfig:
    linear = LinearAttentionConfig(
        full_attention_interval=2, n_key_heads=2, n_value_heads=6, key_head_dim=10, value_head_dim=16, conv_width=3
    )
    parts = {"n_layers": 3, "norm": NormConfig(zero_centered=True), "linear_attention": linear}
    return sparse(attention or QWEN3_NEXT, **(parts | {"moe": gated(RouterConfig(), shared)} | changes))


def listed(layers: list[int]) -> LinearAttentionConfig:
    return LinearAttentionConfig(layers=layers, n_key_heads=3, n_value_heads=3, key_head_dim=14, value_head_dim=18)


GPT_OSS = GqaConfig(
    n_heads=4,
    n_kv_heads=2,
    head_dim=12,
    sinks=True,
    bias=AttentionBias.all,
    sliding_window=5,
    sliding_window_layers=[0, 2],
    rope_theta=15e4,
    yarn=replace(YARN, truncate=False, attention_factor=1.1),
)


def gpt_oss(attention: GqaConfig = GPT_OSS, **changes: object) -> ModelConfig:
    moe = replace(experts(RouterConfig(gate_bias=True)), projection_bias=True)
    swiglu = SwigluConfig(alpha=1.5, limit=0.3, offset=1.0)
    return sparse(attention, n_layers=3, moe=moe, swiglu=swiglu, norm=NormConfig(eps=1e-5), **changes)


SIGMOID = RouterConfig(ScoreFunction.sigmoid)
NOT_NORMALIZED = RouterConfig(normalize_topk=False)
GREEDY = replace(NOT_NORMALIZED, scale=2.0)
QWEN2 = replace(GQA, bias=AttentionBias.qkv)
QWEN3 = replace(GQA, qk_norm=QkNorm.head, head_dim=12)
QWEN3_NEXT = replace(QWEN3, rotary_fraction=0.5, output_gate=True)
OLMOE = replace(GQA, qk_norm=QkNorm.full)
OLMO3 = replace(OLMOE, sliding_window=5, rope_theta=5e5)
DBRX = {"norm": NormConfig(NormKind.layernorm, 1e-5)}
AFTER = {"norm": NormConfig(position=NormPosition.after)}
MELLUM = replace(QWEN3, sliding_window=5, rope_theta=5e5)
EXAONE = replace(QWEN3, sliding_window=5)
AFMOE = replace(EXAONE, output_gate=True)
PHI = replace(GQA, rope_theta=5e3)
PHI_NORM = {"norm": NormConfig(NormKind.layernorm, 1e-5, bias=True)}
PICKED = experts(SparseMixerConfig(margin=0.3), top_k=2)
LONGROPE = LongRopeConfig(64, [1.0, 1.1, 1.3, 2.0], [1.0, 2.0, 5.0, 9.0], 1.1, 1.3)
HUNYUAN = replace(GQA, qk_norm=QkNorm.head_after_rope)
DEEPSEEK_YARN = replace(YARN, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0)
VARIANTS: dict[str, dict[str, ModelConfig]] = {
    "llama": {
        "plain": dense(replace(GQA, rope_theta=5e5)),
        "tied": dense(GQA, tie_embeddings=True),
        "biased": dense(replace(GQA, bias=AttentionBias.all)),
        "head_dim": dense(replace(GQA, head_dim=12, n_kv_heads=1)),
        "yarn": dense(replace(GQA, yarn=YARN)),
        "llama3": dense(replace(GQA, llama3_rope=Llama3RopeConfig(8.0, 16, 1.0, 4.0))),
    },
    "qwen2": {
        "plain": dense(QWEN2),
        "window": dense(replace(QWEN2, sliding_window=5), tie_embeddings=True),
        "windows": dense(replace(QWEN2, sliding_window=5, sliding_window_layers=[1])),
        "yarn": dense(replace(QWEN2, yarn=YARN)),
    },
    "qwen3": {
        "plain": dense(QWEN3),
        "window": dense(replace(QWEN3, sliding_window=5, head_dim=None), tie_embeddings=True),
        "windows": dense(replace(QWEN3, sliding_window=5, sliding_window_layers=[0])),
        "biased": dense(replace(QWEN3, bias=AttentionBias.all)),
        "yarn": dense(replace(QWEN3, yarn=YARN)),
    },
    "mixtral": {
        "plain": sparse(GQA),
        "window": sparse(replace(GQA, sliding_window=5), norm=NormConfig(eps=1e-5)),
        "head_dim": sparse(replace(GQA, head_dim=12, n_kv_heads=4)),
        "tied": sparse(GQA, tie_embeddings=True),
        "yarn": sparse(replace(GQA, yarn=YARN)),
    },
    "olmoe": {
        "plain": sparse(OLMOE, NOT_NORMALIZED),
        "normalized": sparse(replace(OLMOE, n_kv_heads=4), tie_embeddings=True),
        "clipped": sparse(replace(OLMOE, clip_qkv=0.7), NOT_NORMALIZED),
        "biased": sparse(replace(OLMOE, bias=AttentionBias.all)),
        "yarn": sparse(replace(OLMOE, yarn=YARN)),
    },
    "qwen3_moe": {
        "plain": sparse(QWEN3),
        "not_normalized": sparse(replace(QWEN3, head_dim=None), NOT_NORMALIZED, tie_embeddings=True),
        "dense_between": sparse(QWEN3, n_layers=5, n_dense_layers=1, dense_layers=[2, 4], ffn_hidden_size=48),
        "biased": sparse(replace(QWEN3, bias=AttentionBias.all)),
        "window": sparse(replace(QWEN3, sliding_window=5)),
        "yarn": sparse(replace(QWEN3, yarn=YARN)),
    },
    "deepseek_v3": {
        "plain": deepseek(),
        "moonlight": deepseek(replace(MLA, q_lora_rank=None), shared=2, norm=NormConfig(eps=1e-5)),
        "groups": deepseek(num_groups=4, top_k_groups=2, shared=2),
        "groups_not_normalized": deepseek(num_groups=2, top_k_groups=1, normalize=False),
        "no_shared": deepseek(shared=0, tie_embeddings=True),
        "all_sparse": deepseek(n_dense_layers=0, ffn_hidden_size=None),
        "yarn": deepseek(replace(MLA, yarn=DEEPSEEK_YARN)),
        "yarn_without_mscale": deepseek(replace(MLA, yarn=YARN)),
    },
    "dbrx": {
        "plain": sparse(replace(GQA, clip_qkv=8.0), **DBRX),
        "clipped": sparse(replace(GQA, clip_qkv=0.7, n_kv_heads=4, rope_theta=5e5), **DBRX),
        "not_normalized": sparse(replace(GQA, clip_qkv=8.0, n_kv_heads=1), NOT_NORMALIZED, **DBRX),
    },
    "qwen2_moe": {
        "plain": sparse(QWEN2, moe=gated(NOT_NORMALIZED, shared=2)),
        "normalized": sparse(QWEN2, moe=gated(RouterConfig(), shared=1), tie_embeddings=True),
        "dense_between": sparse(
            QWEN2, n_layers=4, n_dense_layers=1, dense_layers=[2], ffn_hidden_size=48, moe=gated(RouterConfig(), 1)
        ),
        "no_shared": sparse(QWEN2),
    },
    "granitemoe": {
        "plain": sparse(replace(GQA, softmax_scale=0.2), multipliers=MultipliersConfig(3.0, 0.5, 1.5)),
        "biased": sparse(replace(GQA, bias=AttentionBias.all), tie_embeddings=True),
        "yarn": sparse(replace(GQA, yarn=YARN)),
    },
    "deepseek_v2": {
        "plain": deepseek(replace(MLA, q_lora_rank=None), router=GREEDY, shared=2),
        "groups": deepseek(router=replace(GREEDY, scale=16.0, num_groups=4, top_k_groups=2)),
        "yarn": deepseek(replace(MLA, yarn=replace(YARN, mscale=0.7, mscale_all_dim=0.7)), router=GREEDY),
    },
    "glm4_moe": {
        "plain": deepseek(replace(QWEN2, rotary_fraction=0.5, head_dim=12)),
        "normed": deepseek(replace(QWEN3, bias=AttentionBias.qkv, rotary_fraction=0.5), num_groups=4, top_k_groups=2),
        "whole": deepseek(GQA, shared=2, tie_embeddings=True, norm=NormConfig(eps=1e-5)),
        "yarn": deepseek(replace(QWEN2, rotary_fraction=0.5, yarn=YARN)),
    },
    "glm4_moe_lite": {
        "plain": deepseek(),
        "dense_between": deepseek(n_dense_layers=2, dense_layers=[3], n_layers=5),
        "yarn": deepseek(replace(MLA, yarn=DEEPSEEK_YARN)),
    },
    "dots1": {
        "plain": deepseek(QWEN3, shared=2),
        "all_sparse": deepseek(QWEN3, n_dense_layers=0, ffn_hidden_size=None, normalize=False),
        "biased": deepseek(replace(QWEN3, bias=AttentionBias.all), num_groups=4, top_k_groups=2),
    },
    "solar_open": {
        "plain": deepseek(replace(GQA, head_dim=12), n_dense_layers=0, ffn_hidden_size=None),
        "biased": deepseek(QWEN2, n_dense_layers=0, ffn_hidden_size=None, tie_embeddings=True),
        "yarn": deepseek(replace(GQA, yarn=YARN), n_dense_layers=0, ffn_hidden_size=None),
    },
    "minimax_m2": {
        "plain": sparse(replace(OLMOE, head_dim=12, rotary_fraction=0.5), SIGMOID),
        "whole": sparse(replace(OLMOE, head_dim=12), SIGMOID, tie_embeddings=True),
    },
    "gpt_oss": {
        "plain": gpt_oss(),
        "unscaled": gpt_oss(replace(GPT_OSS, yarn=None, sliding_window_layers=[1], rope_theta=1e4)),
        "windows": gpt_oss(replace(GPT_OSS, sliding_window_layers=None, bias=AttentionBias.none), tie_embeddings=True),
        "no_window": gpt_oss(replace(GPT_OSS, sliding_window=None, sliding_window_layers=None, head_dim=None)),
    },
    "ernie4_5_moe": {
        "plain": ernie(shared=2, tie_embeddings=True),
        "between": ernie(n_layers=4, dense_layers=[3]),
        "all_sparse": ernie(n_dense_layers=0, ffn_hidden_size=None),
    },
    "qwen3_next": {
        "plain": hybrid(),
        "dense_between": hybrid(
            linear_attention=listed([0, 3]),
            **{"n_layers": 4, "n_dense_layers": 1, "dense_layers": [2], "ffn_hidden_size": 48},
            moe=gated(NOT_NORMALIZED, shared=2),
        ),
        "all_full": hybrid(replace(QWEN3_NEXT, bias=AttentionBias.all), linear_attention=None, tie_embeddings=True),
        "yarn": hybrid(replace(QWEN3_NEXT, yarn=YARN)),
    },
    "qwen3_5_moe_text": {
        "plain": hybrid(),
        "listed": hybrid(replace(QWEN3_NEXT, rotary_fraction=1.0), 2, linear_attention=listed([1])),
        "tied": hybrid(tie_embeddings=True),
    },
    "olmo2": {
        "plain": dense(OLMOE, **AFTER),
        "biased": dense(replace(OLMOE, bias=AttentionBias.all), tie_embeddings=True, **AFTER),
    },
    "olmo3": {
        "plain": dense(replace(OLMO3, sliding_window_layers=[0]), **AFTER),
        "window": dense(
            replace(OLMO3, sliding_window_layers=[0, 2], sliding_window_rope_theta=2e4),
            **{"n_layers": 4, "n_dense_layers": 4, "tie_embeddings": True},
            **AFTER,
        ),
        "yarn": dense(replace(OLMO3, sliding_window_layers=[0], yarn=YARN, sliding_window_rope_theta=5e5), **AFTER),
        "all": dense(replace(OLMO3, bias=AttentionBias.all, yarn=YARN), **AFTER),
    },
    "phimoe": {
        "plain": sparse(replace(PHI, bias=AttentionBias.all), moe=PICKED, head_bias=True, **PHI_NORM),
        "window": sparse(replace(PHI, sliding_window=5), moe=PICKED, **PHI_NORM),
        "longrope": sparse(
            replace(PHI, longrope=LONGROPE), moe=experts(SparseMixerConfig(margin=0.2), 8, 2), **PHI_NORM
        ),
        "tied": sparse(PHI, moe=PICKED, tie_embeddings=True, **PHI_NORM),
    },
    "mellum": {
        "plain": sparse(replace(MELLUM, sliding_window_layers=[0], sliding_window_rope_theta=1e4)),
        "yarn": sparse(
            replace(MELLUM, sliding_window_layers=[1, 2], sliding_window_rope_theta=5e5, yarn=YARN),
            NOT_NORMALIZED,
            **{"n_layers": 4, "n_dense_layers": 1, "dense_layers": [3], "ffn_hidden_size": 48, "tie_embeddings": True},
        ),
        "biased": sparse(replace(MELLUM, sliding_window=None, bias=AttentionBias.all)),
    },
    "exaone_moe": {
        "plain": deepseek(replace(EXAONE, sliding_window_layers=[0, 1], unrotated_layers=[2])),
        "groups": deepseek(EXAONE, num_groups=4, top_k_groups=2, shared=2, n_layers=4, dense_layers=[2]),
        "no_shared": deepseek(EXAONE, shared=0, normalize=False, tie_embeddings=True),
    },
    "afmoe": {
        "plain": afmoe(replace(AFMOE, sliding_window_layers=[0, 1], unrotated_layers=[2]), shared=1),
        "scaled": afmoe(AFMOE, shared=2, multipliers=MultipliersConfig(embedding=32**0.5), tie_embeddings=True),
    },
    "flex_olmo": {
        "plain": sparse(OLMOE, NOT_NORMALIZED, **AFTER),
        "normalized": sparse(replace(OLMOE, bias=AttentionBias.all), tie_embeddings=True, **AFTER),
        "yarn": sparse(replace(OLMOE, yarn=YARN), **AFTER),
    },
    "hunyuan_v1_moe": {
        "plain": sparse(replace(HUNYUAN, head_dim=12), moe=experts(shared=1), tie_embeddings=True),
        "biased": sparse(replace(HUNYUAN, bias=AttentionBias.all), moe=experts(shared=1)),
        "yarn": sparse(replace(HUNYUAN, yarn=YARN), moe=experts(shared=1)),
    },
    "hy_v3": {
        "plain": deepseek(QWEN3),
        "between": deepseek(QWEN3, shared=2, n_layers=4, dense_layers=[2], tie_embeddings=True),
        "biased": deepseek(replace(QWEN3, bias=AttentionBias.all)),
    },
    "sarvam_moe": {
        "plain": deepseek(QWEN3),
        "groups": deepseek(replace(QWEN2, head_dim=12), num_groups=4, top_k_groups=2, tie_embeddings=True),
    },
    "bailing_moe": {
        "plain": deepseek(replace(QWEN3, rotary_fraction=0.5), num_groups=4, top_k_groups=2),
    },
    "deepseek_v32": {
        "plain": deepseek(replace(MLA, indexer=IndexerConfig(6, 3, 10)), num_groups=4, top_k_groups=2),
        "dense": deepseek(replace(MLA, indexer=IndexerConfig(64, 2, 8)), shared=2, tie_embeddings=True),
        "yarn": deepseek(replace(MLA, indexer=IndexerConfig(8, 2, 8), yarn=DEEPSEEK_YARN)),
    },
    "glm_moe_dsa": {
        "plain": deepseek(replace(MLA, indexer=IndexerConfig(6, 3, 10)), num_groups=4, top_k_groups=2),
        "yarn": deepseek(replace(MLA, indexer=IndexerConfig(8, 2, 4), yarn=DEEPSEEK_YARN), dense_layers=[2]),
    },
}
STANDS_IN = {name: FAMILIES[name].stand_in for name in VARIANTS if FAMILIES[name].stand_in}
"""Families that transformers has under another name alone -> that name."""
CASES = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]
OLDER = [family for family in VARIANTS if family in CONFIG_MAPPING_NAMES]
"""Families that the transformers of this environment has, too."""
OLDER_CASES = [(family, variant) for family, variant in CASES if family in OLDER and variant != "windows"]
"""Transformers 4.51 has a window in all blocks or in none."""
FIRST_OF_OLDER = [
    pytest.param(*case, id="-".join(case), marks=() if case[1] == "plain" else pytest.mark.slow) for case in OLDER_CASES
]
"""The same, of which all but a family's first are slow: what today's transformers computes is compared for each."""

LATENT = {
    *("n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
}
SIZES = {  # without these there is no model
    "dbrx": {"d_model", "n_heads", "n_layers", "vocab_size", "attn_config", "ffn_config"},
    "deepseek_v3": {
        *("first_k_dense_replace", "kv_lora_rank", "n_group", "n_routed_experts", "num_experts_per_tok"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "routed_scaling_factor", "topk_group", "v_head_dim"),
    },
    "qwen2_moe": {"shared_expert_intermediate_size"},
    "deepseek_v2": LATENT,
    "glm4_moe_lite": LATENT,
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), LATENT | {"q_lora_rank"}),
    "glm4_moe": {"n_routed_experts", "head_dim"},
    "dots1": {"n_routed_experts", "head_dim"},
    "solar_open": {"n_routed_experts"},
    "ernie4_5_moe": {"moe_num_experts", "moe_k"},
    "qwen3_next": {"shared_expert_intermediate_size"},
    "qwen3_5_moe_text": {"shared_expert_intermediate_size"},
    "hunyuan_v1_moe": {"moe_topk"},
}
COMMON_SIZES = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok"),
}


def sizes(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Its keys without which there is no model, in an order that is the same in every process."""
    found = {key: config[key] for key in sorted(SIZES.get(family, set()) | COMMON_SIZES) if key in config}
    if family == "dbrx":
        found["attn_config"] = {"clip_qkv": 8}
        needed = ("ffn_hidden_size", "moe_num_experts", "moe_top_k")
        found["ffn_config"] = {key: config["ffn_config"][key] for key in needed}
    return found


def transformers_model(family: str, cfg: ModelConfig, attention: str = "eager") -> PreTrainedModel:
    """The model of this environment's transformers, with random weights."""
    config = FAMILIES[family].write_config(cfg, max_seq_len=64, torch_dtype="float32")
    whole_queries = config.get("q_lora_rank", 0) is None
    if whole_queries:  # transformers 4.51 builds no such model; its attention with nothing before `q_b_proj` is that
        config["q_lora_rank"] = 1
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)
    if whole_queries:
        for layer in model.model.layers:
            layer.self_attn.q_a_proj, layer.self_attn.q_a_layernorm = nn.Identity(), nn.Identity()
            layer.self_attn.q_b_proj = nn.Linear(cfg.d_model, layer.self_attn.q_b_proj.out_features, bias=False)
    randomize(model, seed=0)
    return model.eval()


def add_prediction_module(model: PreTrainedModel) -> None:
    """One more layer with what DeepSeek's checkpoints hold for multi-token prediction, its copies left out."""
    layers, width, eps = model.model.layers, model.config.hidden_size, model.config.rms_norm_eps
    layer = DeepseekV3DecoderLayer(model.config, layer_idx=len(layers))
    layer.enorm, layer.hnorm = DeepseekV3RMSNorm(width, eps), DeepseekV3RMSNorm(width, eps)
    layer.eh_proj = nn.Linear(2 * width, width, bias=False)
    layer.shared_head = nn.Module()
    layer.shared_head.norm = DeepseekV3RMSNorm(width, eps)
    randomize(layer, seed=len(layers))
    layers.append(layer.eval())


def their_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers of transformers' model, by the names of a checkpoint. Tensors without elements (of no
    shared experts) are left out, and so is a tied head."""
    tensors = model.state_dict(keep_vars=True)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    query = "q_b_proj" if any("q_a_proj" in name for name in tensors) else "q_proj"
    return {name.replace("q_b_proj", query): tensor for name, tensor in tensors.items() if tensor.numel()}


def our_tensors(model: MoETransformer) -> dict[str, Tensor]:
    tensors = model.state_dict(keep_vars=True)
    if model.cfg.tie_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def blocks(
    pieces: Iterator[Piece], ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Each piece with its two blocks, in our orientation."""
    for piece in pieces:
        our = ours[piece.name] if piece.expert is None else ours[piece.name][piece.expert]
        our = our if piece.our_rows is None else our[slice(*piece.our_rows)]
        their = theirs[piece.hf_name] if piece.part is None else theirs[piece.hf_name][piece.part]
        yield piece, our, piece.of_their_block(their if piece.rows is None else their[slice(*piece.rows)])


def our_model(family: str, cfg: ModelConfig, theirs: dict[str, Tensor]) -> MoETransformer:
    """Our model with the weights of theirs."""
    model = MoETransformer(cfg).eval()
    with torch.no_grad():
        for _, our, their in blocks(FAMILIES[family].pieces(cfg), our_tensors(model), theirs):
            our.copy_(their)
    return model


def assert_covered_once(pieces: list[Piece], ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    counts = [{name: torch.zeros(tensor.shape) for name, tensor in side.items()} for side in (ours, theirs)]
    for piece, our, their in blocks(iter(pieces), *counts):
        assert our.shape == their.shape, piece
        our += 1
        their += 1
    for side in counts:
        assert {name for name, count in side.items() if (count != 1).any()} == set()
