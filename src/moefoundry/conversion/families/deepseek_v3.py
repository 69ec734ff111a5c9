"""DeepSeek-V3 (arXiv 2412.19437), and Moonlight, which has its architecture.

It has latent attention, sigmoid scores with an expert bias, shared experts, and modules that predict further tokens.
RoPE is interleaved there as here, so no weight is permuted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionConfig,
    AuxLossScope,
    BalanceConfig,
    MlaConfig,
    ModelConfig,
    MoEConfig,
    MtpConfig,
    RouterConfig,
    ScoreFunction,
)
from moefoundry.conversion.families.family import Piece, ffn_width, with_dense_layers
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts, ffn
from moefoundry.conversion.families.rope_scaling import read_rope, write_yarn


class DeepseekV3(Llama):
    """DeepSeek-V3."""

    name = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    attention_kind = "mla"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
    }

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Return an expert bias, and a small loss of each sequence beside it."""
        weight = hf.get("aux_loss_alpha", 0.0001)
        return BalanceConfig(weight, AuxLossScope.sequence, z_loss_weight=0.0, bias_update_rate=0.001)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        theta, yarn = read_rope(keys)
        attention = MlaConfig(
            n_heads=keys.size("num_attention_heads"),
            rope_theta=theta,
            yarn=yarn,
            q_lora_rank=keys.size("q_lora_rank") if keys.has("q_lora_rank") else None,
            kv_lora_rank=keys.size("kv_lora_rank"),
            qk_nope_head_dim=keys.size("qk_nope_head_dim"),
            qk_rope_head_dim=keys.size("qk_rope_head_dim"),
            v_head_dim=keys.size("v_head_dim"),
        )
        keys.only("num_key_value_heads", attention.n_heads)
        keys.only("head_dim", attention.qk_rope_head_dim)  # transformers' name for the width that rotates
        keys.only("qk_head_dim", attention.qk_nope_head_dim + attention.qk_rope_head_dim)
        keys.only("rope_interleave", True)
        keys.only("attention_bias", False)
        return attention

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, MlaConfig)
        return {
            "num_attention_heads": cfg.attention.n_heads,
            "num_key_value_heads": cfg.attention.n_heads,
            "rope_theta": cfg.attention.rope_theta,
            "rope_scaling": write_yarn(cfg.attention.yarn),
            "q_lora_rank": cfg.attention.q_lora_rank,
            "kv_lora_rank": cfg.attention.kv_lora_rank,
            "qk_nope_head_dim": cfg.attention.qk_nope_head_dim,
            "qk_rope_head_dim": cfg.attention.qk_rope_head_dim,
            "v_head_dim": cfg.attention.v_head_dim,
        }

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("n_routed_experts", "num_local_experts")
        keys.alias("num_nextn_predict_layers", "num_mtp_layers")
        keys.only("moe_layer_freq", 1)
        keys.only("scoring_func", "sigmoid")
        keys.only("topk_method", "noaux_tc")
        moe = MoEConfig(
            num_experts=keys.size("n_routed_experts"),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size("moe_intermediate_size"),
            num_shared_experts=keys.count("n_shared_experts") if keys.has("n_shared_experts") else 0,
            router=RouterConfig(
                score_function=ScoreFunction.sigmoid,
                normalize_topk=keys.flag("norm_topk_prob"),
                scale=keys.number("routed_scaling_factor"),
                num_groups=keys.size("n_group"),
                top_k_groups=keys.size("topk_group"),
            ),
        )
        first = min(keys.count("first_k_dense_replace"), cfg.n_layers)
        mtp = MtpConfig(depth=keys.count("num_nextn_predict_layers"))
        cfg = replace(cfg, ffn_hidden_size=keys.size("intermediate_size"), moe=moe, mtp=mtp)
        return with_dense_layers(cfg, list(range(first)))

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        moe = cfg.moe
        return {
            "intermediate_size": ffn_width(cfg),
            "first_k_dense_replace": cfg.n_dense_layers,
            "moe_layer_freq": 1,
            "moe_intermediate_size": moe.expert_hidden_size,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "n_shared_experts": moe.num_shared_experts,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": moe.router.normalize_topk,
            "routed_scaling_factor": moe.router.scale,
            "n_group": moe.router.num_groups,
            "topk_group": moe.router.top_k_groups,
            "num_nextn_predict_layers": cfg.mtp.depth,
        }

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        yield from super().pieces(cfg)
        for index, theirs in enumerate(_mtp_layers(cfg)):
            ours = f"mtp.{index}"
            yield Piece(f"{ours}.embedding_norm.weight", f"{theirs}.enorm.weight")
            yield Piece(f"{ours}.hidden_norm.weight", f"{theirs}.hnorm.weight")
            yield Piece(f"{ours}.proj.weight", f"{theirs}.eh_proj.weight")
            yield from self._layer(cfg, f"{ours}.block", theirs, dense=False)
            yield Piece(f"{ours}.norm.weight", f"{theirs}.shared_head.norm.weight")

    def copies(self, cfg: ModelConfig) -> dict[str, str]:
        head = "model.embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"
        found = super().copies(cfg)
        for theirs in _mtp_layers(cfg):
            found[f"{theirs}.embed_tokens.weight"] = "model.embed_tokens.weight"
            found[f"{theirs}.shared_head.head.weight"] = head
        return found

    def empty_tensors(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        if cfg.moe.num_shared_experts:
            return {}
        shapes = {"gate_proj": (0, cfg.d_model), "up_proj": (0, cfg.d_model), "down_proj": (cfg.d_model, 0)}
        return {
            f"model.layers.{index}.mlp.shared_experts.{name}.weight": shape
            for index in range(cfg.n_dense_layers, cfg.n_layers)
            for name, shape in shapes.items()
        }

    def _attention_tensors(self, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
        assert isinstance(cfg.attention, MlaConfig)
        if cfg.attention.q_lora_rank is None:
            yield "q_proj.weight", "q_proj.weight"
        else:
            yield "q_a_proj.weight", "q_a_proj.weight"
            yield "q_a_norm.weight", "q_a_layernorm.weight"
            yield "q_b_proj.weight", "q_b_proj.weight"
        yield "kv_a_proj.weight", "kv_a_proj_with_mqa.weight"
        yield "kv_a_norm.weight", "kv_a_layernorm.weight"
        yield "kv_b_proj.weight", "kv_b_proj.weight"
        yield "o_proj.weight", "o_proj.weight"

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        yield Piece(f"{ours}.router.expert_bias", f"{theirs}.mlp.gate.e_score_correction_bias")
        yield from experts(cfg, ours, f"{theirs}.mlp")
        if cfg.moe.num_shared_experts:
            yield from ffn(f"{ours}.shared_experts", f"{theirs}.mlp.shared_experts")


def _mtp_layers(cfg: ModelConfig) -> list[str]:
    """Name the modules of multi-token prediction; there they follow the model's own layers."""
    return [f"model.layers.{cfg.n_layers + index}" for index in range(cfg.mtp.depth)]
