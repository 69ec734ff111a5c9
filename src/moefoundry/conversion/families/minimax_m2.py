"""MiniMax-M2: sigmoid scores with an expert bias, no shared experts, and queries and keys normed over all heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionConfig,
    BalanceConfig,
    GqaConfig,
    ModelConfig,
    QkNorm,
    RouterConfig,
    ScoreFunction,
)
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import experts
from moefoundry.conversion.families.llama_moe import LlamaMoe


class MinimaxM2(LlamaMoe):
    """MiniMax-M2. Its published files hold none of the prediction modules that their config speaks of."""

    name = "minimax_m2"
    architecture = "MiniMaxM2ForCausalLM"
    absent = "prediction of further tokens, of which no weights are published"
    defaults: ClassVar[dict[str, Any]] = {
        **LlamaMoe.defaults,
        "rope_theta": 5e6,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "router_jitter_noise": 0.0,
    }
    bias_of_key = None
    partial_rotation = True
    count_keys = ("num_local_experts", "num_experts")
    names_in_memory: ClassVar[dict[str, str]] = {".block_sparse_moe.": ".mlp."}

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Return an expert bias, and Mixtral's loss beside it."""
        return replace(super().balance(cfg, hf), bias_update_rate=0.001)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        if keys.has("rotary_dim"):  # the published name
            keys.assume("partial_rotary_factor", keys.size("rotary_dim") / keys.size("head_dim"))
        keys.only("use_qk_norm", True)
        keys.only("qk_norm_type", "per_layer")
        keys.only("attn_type_list", [1] * keys.size("num_hidden_layers"))
        keys.only("sliding_window", None)
        attention = self._read_gqa(keys)
        keys.only("rotary_dim", attention.rotary_dim(keys.size("hidden_size")))
        return replace(attention, qk_norm=QkNorm.full)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        norm = {"use_qk_norm": True, "qk_norm_type": "per_layer"}  # without the first SGLang norms neither
        return super()._write_attention(cfg) | {"rotary_dim": cfg.attention.rotary_dim(cfg.d_model), **norm}

    def _read_router(self, keys: Keys) -> RouterConfig:
        keys.only("scoring_func", "sigmoid")
        keys.only("use_routing_bias", True)
        keys.only("shared_intermediate_size", 0)
        keys.skip("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "mlp_intermediate_size", "shared_moe_mode")
        keys.skip(*(f"layernorm_{part}_beta" for part in ("full_attention", "linear_attention", "mlp")))
        return RouterConfig(ScoreFunction.sigmoid, input_jitter=keys.number("router_jitter_noise"))

    def _write_router(self, router: RouterConfig) -> dict[str, Any]:
        return {"router_jitter_noise": router.input_jitter, "scoring_func": "sigmoid", "use_routing_bias": True}

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        yield Piece(f"{ours}.router.expert_bias", f"{theirs}.block_sparse_moe.e_score_correction_bias")
        yield from experts(cfg, ours, f"{theirs}.block_sparse_moe", names=("w1", "w3", "w2"))
