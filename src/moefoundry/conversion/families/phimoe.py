"""Phi-3.5-MoE: SparseMixer's router, LayerNorms and an output head with biases, and LongRoPE.

Files saved by transformers 5 are read, and computed by version 4 and here with LongRoPE's long factors where a sequence
is longer than ``original_max_position_embeddings``; version 5 has the short factors there, too.
"""

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
    NormKind,
    RouterConfig,
    SparseMixerConfig,
)
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts
from moefoundry.conversion.families.llama_moe import LlamaMoe
from moefoundry.conversion.families.rope_scaling import OLD, ORIGINAL, read_rope, write_longrope

PICKED = 2  # experts of a token, whatever the config says


class PhiMoe(LlamaMoe):
    """Phi-3.5-MoE."""

    name = "phimoe"
    architecture = "PhimoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "lm_head_bias": False,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
    }
    count_keys = ("num_local_experts", "num_experts")
    names_in_memory: ClassVar[dict[str, str]] = {
        ".block_sparse_moe.gate.": ".mlp.router.",
        ".block_sparse_moe.": ".mlp.",
    }

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Return a customary loss: the one that these models were trained with is not in the config, which has 0."""
        return BalanceConfig(0.01, AuxLossScope.global_batch, z_loss_weight=0.0)

    def _read(self, keys: Keys) -> ModelConfig:
        cfg = super()._read(keys)
        norm = replace(cfg.norm, kind=NormKind.layernorm, bias=True)
        return replace(cfg, norm=norm, head_bias=keys.flag("lm_head_bias"))

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write(cfg) | {"lm_head_bias": cfg.head_bias}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        keys.only("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
        attention = self._read_gqa(keys, read_rope(keys, kinds=("longrope",)))
        if attention.longrope is not None:
            keys.only(ORIGINAL, attention.longrope.original_max_seq_len)
        keys.skip(ORIGINAL)
        window = keys.size("sliding_window") if keys.has("sliding_window") else None
        return replace(attention, sliding_window=window)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        own = {"sliding_window": cfg.attention.sliding_window, OLD: write_longrope(cfg.attention.longrope)}
        keys = super()._write_attention(cfg) | own
        del keys["head_dim"]  # always d_model / n_heads there
        return keys

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.only("num_experts_per_tok", PICKED)
        keys.only("hidden_dropout", 0.0)
        keys.assume("num_experts_per_tok", PICKED)
        return super()._read_ffn(keys, cfg)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_ffn(cfg) | {"num_experts_per_tok": PICKED}

    def _read_router(self, keys: Keys) -> RouterConfig:
        margin, jitter = (keys.number(f"{name}_jitter_noise") for name in ("router", "input"))
        return SparseMixerConfig(margin=margin, input_jitter=jitter)

    def _write_router(self, router: RouterConfig) -> dict[str, Any]:
        margin = router.margin if isinstance(router, SparseMixerConfig) else 0.0
        return {"router_jitter_noise": margin, "input_jitter_noise": router.input_jitter}

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        for piece in super().pieces(cfg):
            yield piece
            if piece.name.endswith("norm.weight") or (piece.name == "lm_head.weight" and cfg.head_bias):
                yield Piece(piece.name.replace("weight", "bias"), piece.hf_name.replace("weight", "bias"))
        if cfg.tie_embeddings and cfg.head_bias:
            yield Piece("lm_head.bias", "lm_head.bias")

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        return experts(cfg, ours, f"{theirs}.block_sparse_moe", names=("w1", "w3", "w2"))
