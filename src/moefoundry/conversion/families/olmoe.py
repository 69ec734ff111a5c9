"""OLMoE (arXiv 2409.02060): many small experts in every layer, queries and keys normed over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionConfig,
    AuxLossScope,
    BalanceConfig,
    GqaConfig,
    ModelConfig,
    MoEConfig,
    QkNorm,
    RouterConfig,
)
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama


class Olmoe(Llama):
    name = "olmoe"
    architecture = "OlmoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Llama.defaults, "norm_topk_prob": False, "rms_norm_eps": 1e-5}

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Means over layers there; the z-loss, of which the config says nothing, has the paper's weight."""
        weight = hf.get("router_aux_loss_coef", 0.01) / cfg.n_layers
        return BalanceConfig(weight, AuxLossScope.micro_batch, z_loss_weight=0.001 / cfg.n_layers / cfg.moe.top_k)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        clip = keys.number("clip_qkv") if keys.has("clip_qkv") else None
        keys.only("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
        return replace(self._read_gqa(keys), qk_norm=QkNorm.full, clip_qkv=clip)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        keys = super()._write_attention(cfg) | {"clip_qkv": cfg.attention.clip_qkv}
        del keys["head_dim"]  # always d_model / n_heads there
        return keys

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("num_experts", "num_local_experts")
        moe = MoEConfig(
            num_experts=keys.size("num_experts"),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size("intermediate_size"),
            num_shared_experts=0,
            router=RouterConfig(normalize_topk=keys.flag("norm_topk_prob")),
        )
        return replace(cfg, n_dense_layers=0, moe=moe)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": cfg.moe.expert_hidden_size,
            "num_experts": cfg.moe.num_experts,
            "num_experts_per_tok": cfg.moe.top_k,
            "norm_topk_prob": cfg.moe.router.normalize_topk,
        }
