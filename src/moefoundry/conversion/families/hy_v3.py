"""Hy3: DeepSeek-V3's scores and shared experts beside the attention of Qwen3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, ModelConfig, MoEConfig, QkNorm, RouterConfig, ScoreFunction
from moefoundry.conversion.families.deepseek_moe import DeepseekMoe
from moefoundry.conversion.families.family import Piece, ffn_width, with_dense_layers
from moefoundry.conversion.families.glm4_moe import read_dense, write_layer_types
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts, ffn

SWITCHES = ("moe_router_use_sigmoid", "moe_router_enable_expert_bias", "qk_norm", "route_norm")


class HyV3(Llama):
    """Hy3. The weights of the top k are normalized and scaled."""

    name = "hy_v3"
    architecture = "HYV3ForCausalLM"
    absent = "prediction of further tokens"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.006,
        "rope_theta": 11_158_840.0,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "num_shared_experts": 1,
        "router_scaling_factor": 2.826,
        "first_k_dense_replace": 1,
    }
    names_in_memory: ClassVar[dict[str, str]] = {
        ".mlp.router.gate.": ".mlp.gate.",
        ".mlp.expert_bias": ".mlp.e_score_correction_bias",
        ".mlp.shared_mlp.": ".mlp.shared_experts.",
    }
    balance = DeepseekMoe.balance

    def left_out(self, cfg: ModelConfig) -> dict[str, str]:
        return {f"model.layers.{cfg.n_layers}.": "the module that predicts a further token"}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        return replace(self._read_gqa(keys), qk_norm=QkNorm.head)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("num_experts", "num_local_experts")
        keys.only("mlp_bias", False)
        for switch in SWITCHES:
            keys.only(switch, True)
        keys.only("expert_hidden_dim", keys.size("moe_intermediate_size"))  # the same again
        keys.skip("num_nextn_predict_layers", "use_grouped_mm", "eod_token_id")
        keys.skip(*(f"enable_{part}" for part in ("moe_fp32_combine", "lm_head_fp32", "attention_fp32_softmax")))
        router = RouterConfig(ScoreFunction.sigmoid, scale=keys.number("router_scaling_factor"))
        moe = MoEConfig(
            num_experts=keys.size("num_experts"),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size("moe_intermediate_size"),
            num_shared_experts=keys.size("num_shared_experts"),
            router=router,
        )
        cfg = replace(cfg, ffn_hidden_size=keys.size("intermediate_size"), moe=moe)
        return with_dense_layers(cfg, read_dense(keys, cfg.n_layers))

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": ffn_width(cfg),
            "moe_intermediate_size": cfg.moe.expert_hidden_size,
            "expert_hidden_dim": cfg.moe.expert_hidden_size,
            "num_experts": cfg.moe.num_experts,
            "num_experts_per_tok": cfg.moe.top_k,
            "num_shared_experts": cfg.moe.num_shared_experts or 1,
            "router_scaling_factor": cfg.moe.router.scale,
            "mlp_layer_types": write_layer_types(cfg),  # which transformers reads
            "first_k_dense_replace": cfg.n_dense_layers,  # and others this, and the switches
            **dict.fromkeys(SWITCHES, True),
        }

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        yield Piece(f"{ours}.router.expert_bias", f"{theirs}.mlp.expert_bias")
        yield from experts(cfg, ours, f"{theirs}.mlp", gate="router.gate")
        yield from ffn(f"{ours}.shared_experts", f"{theirs}.mlp.shared_mlp")
