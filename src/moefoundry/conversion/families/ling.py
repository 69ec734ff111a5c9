"""Ling 2.0 and Ring (``bailing_moe``, arXiv 2510.22115), and Sarvam, which has their layout: DeepSeek-V3's experts.

Queries, keys and values are one matrix there, one below the other, and many keys and tensors have names of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionBias, AttentionConfig, GqaConfig, ModelConfig, QkNorm
from moefoundry.conversion.families.deepseek_moe import DeepseekMoe
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys

KEYS = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "scoring_func": "score_function",
    "attention_bias": "use_qkv_bias",
}
"""DeepSeek's name of a key -> the published one."""
SWITCHES = ("enable_expert_bias", "enable_routed_scaling", "enable_shared_expert")
ASKED_FOR = {
    "use_bias": False,
    "use_rmsnorm": True,
    "embedding_dropout": 0.0,
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
}
"""Keys without which vLLM or SGLang builds no such model, or one with other norms or without the expert bias."""
QKV = "query_key_value"


class SarvamMoe(DeepseekMoe):
    """Sarvam, whose architecture transformers has."""

    name = "sarvam_moe"
    architecture = "SarvamMoEForCausalLM"
    absent = "prediction of further tokens; files with queries, keys and values apart"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekMoe.defaults,
        "initializer_range": 0.006,
        "rope_theta": 8e6,
        "head_dim": 64,
        "num_key_value_heads": 4,
        "use_qk_norm": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    bias_of_key = AttentionBias.qkv
    partial_rotation = True
    embedding = "model.word_embeddings.weight"

    # ---------------------------------------------------------------------------------------------------------- config

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        for name, published in KEYS.items():
            keys.alias(name, published)
        qk_norm = QkNorm.head if keys.flag("use_qk_norm") else QkNorm.none
        attention = replace(self._read_gqa(keys), qk_norm=qk_norm)
        keys.only("rotary_dim", attention.rotary_dim(keys.size("hidden_size")))
        for option in ("use_bias", "use_sliding_window", "norm_head", "norm_softmax"):
            keys.only(option, False)
        keys.only("use_rmsnorm", True)
        keys.skip("max_window_layers", "sliding_window")
        return attention

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return super()._write_attention(cfg) | {"use_qk_norm": cfg.attention.qk_norm == QkNorm.head}

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.only("num_nextn_predict_layers", 0)
        for switch in SWITCHES:
            keys.only(f"moe_router_{switch}", True)
        for dropout in ("embedding_dropout", "output_dropout"):
            keys.only(dropout, 0.0)
        keys.skip("router_dtype", "mtp_loss_scaling_factor")
        cfg = super()._read_ffn(keys, cfg)
        keys.only("moe_shared_expert_intermediate_size", cfg.moe.expert_hidden_size)  # of each
        return cfg

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        keys = super()._write(cfg) | {"num_nextn_predict_layers": 0, **ASKED_FOR}
        return {KEYS.get(key, key): value for key, value in keys.items()}

    # --------------------------------------------------------------------------------------------------------- tensors

    def _layer(self, cfg: ModelConfig, ours: str, theirs: str, dense: bool) -> Iterator[Piece]:
        for piece in super()._layer(cfg, ours, theirs, dense):
            name = piece.hf_name.replace(".self_attn.", ".attention.")
            yield replace(piece, hf_name=name.replace(".gate.e_score_correction_bias", ".gate.expert_bias"))

    def _attention_tensors(self, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
        names = {"o_proj": "dense", "q_norm": "query_layernorm", "k_norm": "key_layernorm"}
        for ours, theirs in super()._attention_tensors(cfg):
            module, _, kind = theirs.partition(".")
            yield ours, f"{names.get(module, QKV)}.{kind}"

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        assert isinstance(cfg.attention, GqaConfig)
        query, key = cfg.attention.projection_widths(cfg.d_model)
        rows = {"q_proj": (0, query), "k_proj": (query, query + key), "v_proj": (query + key, query + 2 * key)}
        for piece in super().pieces(cfg):
            projection = piece.name.split(".")[-2]
            yield replace(piece, rows=rows[projection]) if f".{QKV}." in piece.hf_name else piece


class BailingMoe(SarvamMoe):
    """Ling 2.0 and Ring, of which transformers has no model: what it has for Sarvam computes the same."""

    name = "bailing_moe"
    architecture = "BailingMoeV2ForCausalLM"
    stand_in = "sarvam_moe"
    absent = "a model of its own in transformers; prediction of further tokens"
    defaults: ClassVar[dict[str, Any]] = {
        **SarvamMoe.defaults,
        "initializer_range": 0.02,
        "rope_theta": 600000.0,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "n_group": 8,
        "topk_group": 4,
    }
