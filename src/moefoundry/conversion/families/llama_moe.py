"""Llama with routed experts in place of every FFN: Mixtral and OLMoE."""

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
    QkNorm,
    RouterConfig,
)
from moefoundry.conversion.families.family import Piece, loss_weight
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts


class LlamaMoe(Llama):
    """Frame of families whose experts and router have their keys at the top of the config.

    Attributes:
        count_keys: Names of the number of experts; the first is written, the second is read too.
        width_key: Name of the hidden size of an expert.
    """

    count_keys: ClassVar[tuple[str, str]] = ("num_experts", "num_local_experts")
    width_key: ClassVar[str] = "intermediate_size"

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Convert a mean over layers and a sum over choices."""
        weight = loss_weight(hf, "router_aux_loss_coef", 0.001) * cfg.moe.top_k / cfg.n_layers
        return BalanceConfig(weight, AuxLossScope.micro_batch, z_loss_weight=0.0)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias(*self.count_keys)
        moe = MoEConfig(
            num_experts=keys.size(self.count_keys[0]),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size(self.width_key),
            num_shared_experts=0,
            router=self._read_router(keys),
        )
        return replace(cfg, n_dense_layers=0, moe=moe)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            self.width_key: cfg.moe.expert_hidden_size,
            self.count_keys[0]: cfg.moe.num_experts,
            "num_experts_per_tok": cfg.moe.top_k,
            **self._write_router(cfg.moe.router),
        }

    def _read_router(self, keys: Keys) -> RouterConfig:
        return RouterConfig(normalize_topk=keys.flag("norm_topk_prob"))

    def _write_router(self, router: RouterConfig) -> dict[str, Any]:
        return {"norm_topk_prob": router.normalize_topk}


class Mixtral(LlamaMoe):
    """Mixtral (arXiv 2401.04088): a few wide experts in every layer, whose top-k weights sum to 1."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "router_jitter_noise": 0.0,
    }
    bias_of_key = None
    count_keys = ("num_local_experts", "num_experts")
    names_in_memory: ClassVar[dict[str, str]] = {".block_sparse_moe.": ".mlp."}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        window = keys.size("sliding_window") if keys.has("sliding_window") else None
        return replace(self._read_gqa(keys), sliding_window=window)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return super()._write_attention(cfg) | {"sliding_window": cfg.attention.sliding_window}

    def _read_router(self, keys: Keys) -> RouterConfig:
        return RouterConfig(input_jitter=keys.number("router_jitter_noise"))

    def _write_router(self, router: RouterConfig) -> dict[str, Any]:
        return {"router_jitter_noise": router.input_jitter}

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        return experts(cfg, ours, f"{theirs}.block_sparse_moe", names=("w1", "w3", "w2"))


class Olmoe(LlamaMoe):
    """OLMoE (arXiv 2409.02060): many small experts in every layer, queries and keys normed over all heads together."""

    name = "olmoe"
    architecture = "OlmoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Llama.defaults, "norm_topk_prob": False, "rms_norm_eps": 1e-5}

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Convert means over layers; the z-loss, of which the config says nothing, has the paper's weight."""
        weight = loss_weight(hf, "router_aux_loss_coef", 0.01) / cfg.n_layers
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
