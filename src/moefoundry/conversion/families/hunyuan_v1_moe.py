"""Hunyuan-A13B: softmax scores beside a shared expert, and heads that are normed after their rotation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, ModelConfig, MoEConfig, QkNorm, RouterConfig
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import MOST, Keys
from moefoundry.conversion.families.llama import Llama, experts, ffn
from moefoundry.conversion.families.llama_moe import LlamaMoe

OTHER_MODALITIES = (
    *("add_classification_head", "class_num", "dense_list", "mask_init_id", "num_media_embeds", "pool_type", "pad_id"),
    *("im_start_id", "im_end_id", "im_newline_id", "image_token_id", "text_start_id", "text_end_id", "skip_cls_token"),
    *("video_start_id", "video_end_id", "eod_token_id", "org_vocab_size", "cla_share_factor", "norm_type"),
)
NO_OPTIONS = ("use_cla", "use_mla", "mlp_bias", "position_embedding_xdrope", "group_limited_greedy", "moe_drop_tokens")
LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group")
ALPHA_KEYS = {
    "type",
    "rope_type",
    "alpha",
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "rope_theta",
}


class HunyuanV1Moe(LlamaMoe):
    """Hunyuan-A13B. Experts are in every block, and one shared expert is as wide as a routed one.

    Its context is extended by ``alpha``, which makes the base of the frequencies larger, whatever the length. The base
    that it gives, ``rope_theta * alpha ** (d / (d - 2))``, is read, and written.
    """

    name = "hunyuan_v1_moe"
    architecture = "HunYuanMoEV1ForCausalLM"
    absent = "attention across layers; experts of several widths"
    defaults: ClassVar[dict[str, Any]] = {**Llama.defaults, "rms_norm_eps": 1e-5}
    head_norms = ("query_layernorm", "key_layernorm")

    def read_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        return super().read_config(_with_the_larger_base(hf))

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        keys.alias("head_dim", "attention_head_dim")
        for option in ("use_qk_norm", "use_rotary_pos_emb"):
            keys.only(option, True)
        for option in NO_OPTIONS:
            keys.only(option, False)
        for option in LATENT:
            keys.only(option, None)
        keys.skip(*OTHER_MODALITIES, "moe_random_routing_dropped_token", "routed_scaling_factor")
        return replace(self._read_gqa(keys), qk_norm=QkNorm.head_after_rope)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        for key, same in (("num_experts", "num_local_experts"), ("moe_topk", "num_experts_per_tok")):
            keys.alias(key, same)
        width = keys.size("intermediate_size")
        for key, value in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
            if keys.has(key) and keys.size_of_each(key) != value:
                keys.refuse(key, f"{value} in each block")
        keys.only("moe_layer_num_skipped", 0)
        keys.only("norm_topk_prob", True)
        keys.only("use_mixed_mlp_moe", True)
        moe = MoEConfig(
            num_experts=keys.size_of_each("num_experts"),
            top_k=keys.size_of_each("moe_topk"),
            expert_hidden_size=width,
            num_shared_experts=1,
            router=RouterConfig(),
        )
        return replace(cfg, n_dense_layers=0, moe=moe)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": cfg.moe.expert_hidden_size,
            "moe_intermediate_size": cfg.moe.expert_hidden_size,
            "num_experts": cfg.moe.num_experts,
            "moe_topk": cfg.moe.top_k,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
        }

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        yield from experts(cfg, ours, f"{theirs}.mlp", gate="gate.wg")
        yield from ffn(f"{ours}.shared_experts", f"{theirs}.mlp.shared_mlp")


def _with_the_larger_base(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace an extension by ``alpha`` with the base that it gives; others are left to be read."""
    for name in ("rope_scaling", "rope_parameters"):
        scaling = hf.get(name)
        if not isinstance(scaling, dict) or not isinstance(scaling.get("alpha"), int | float):
            continue
        kind = scaling.get("rope_type", scaling.get("type"))
        theta, alpha = scaling.get("rope_theta", hf.get("rope_theta", 1e4)), scaling["alpha"]
        width = _width_of_a_head(hf)
        if kind != "dynamic" or not scaling.keys() <= ALPHA_KEYS or scaling.get("factor", 1.0) != 1.0:
            continue
        if width > 2 and all(isinstance(value, int | float) and 0 < value < MOST for value in (theta, alpha)):
            base = theta * alpha ** (width / (width - 2))
            return {key: value for key, value in hf.items() if key != name} | {"rope_theta": base}
    return hf


def _width_of_a_head(hf: Mapping[str, Any]) -> int:
    """Give the width of a head; 0 where the keys that say it are not sound."""
    said = hf.get("head_dim") or hf.get("attention_head_dim")
    width, heads = (said, 1) if said else (hf.get("hidden_size"), hf.get("num_attention_heads"))
    if not (isinstance(width, int) and isinstance(heads, int)) or heads < 1:
        return 0
    return width // heads
