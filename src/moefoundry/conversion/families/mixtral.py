"""Mixtral (arXiv 2401.04088): a few wide experts in every layer, whose top-k weights sum to 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionConfig,
    AuxLossScope,
    BalanceConfig,
    GqaConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts
from moefoundry.conversion.families.pieces import Piece


class Mixtral(Llama):
    name = "mixtral"
    architecture = "MixtralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "router_jitter_noise": 0.0,
    }
    has_attention_bias = False

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """A mean over layers and a sum over choices there."""
        weight = hf.get("router_aux_loss_coef", 0.001) * cfg.moe.top_k / cfg.n_layers
        return BalanceConfig(weight, AuxLossScope.micro_batch, z_loss_weight=0.0)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        window = keys.size("sliding_window") if keys.has("sliding_window") else None
        return replace(self._read_gqa(keys), sliding_window=window)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return super()._write_attention(cfg) | {"sliding_window": cfg.attention.sliding_window}

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("num_local_experts", "num_experts")
        moe = MoEConfig(
            num_experts=keys.size("num_local_experts"),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size("intermediate_size"),
            num_shared_experts=0,
            router=RouterConfig(input_jitter=keys.number("router_jitter_noise")),
        )
        return replace(cfg, n_dense_layers=0, moe=moe)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": cfg.moe.expert_hidden_size,
            "num_local_experts": cfg.moe.num_experts,
            "num_experts_per_tok": cfg.moe.top_k,
            "router_jitter_noise": cfg.moe.router.input_jitter,
        }

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        return experts(cfg, ours, f"{theirs}.block_sparse_moe", names=("w1", "w3", "w2"))
