"""dots.llm1 (arXiv 2506.05767) and Solar Open: DeepSeek-V3's experts beside plain grouped-query attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionBias, AttentionConfig, GqaConfig, ModelConfig, QkNorm
from moefoundry.conversion.families.deepseek_moe import DeepseekMoe
from moefoundry.conversion.families.keys import Keys


class Dots1(DeepseekMoe):
    """dots.llm1: queries and keys are normed over each head."""

    name = "dots1"
    architecture = "Dots1ForCausalLM"
    absent = "a window"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekMoe.defaults,
        "n_shared_experts": None,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "sliding_window": 4096,
        "max_window_layers": 62,
    }

    def _read_groups(self, keys: Keys) -> tuple[int, int]:
        if not (keys.has("n_group") or keys.has("topk_group")):  # null, as published
            keys.assume("n_group", 1)
            keys.assume("topk_group", 1)
        return super()._read_groups(keys)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        if keys.has("sliding_window") and keys.count("max_window_layers") < keys.size("num_hidden_layers"):
            keys.refuse("sliding_window", "null, as it is in some layers only")
        keys.only("use_sliding_window", False)
        keys.skip("sliding_window", "max_window_layers")
        return replace(self._read_gqa(keys), qk_norm=QkNorm.head)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return super()._write_attention(cfg) | {"sliding_window": None, "max_window_layers": cfg.n_layers}

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.only("num_nextn_predict_layers", 0)
        return super()._read_ffn(keys, cfg)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_ffn(cfg) | {"num_nextn_predict_layers": 0}


class SolarOpen(DeepseekMoe):
    """Solar Open: experts in every block."""

    name = "solar_open"
    architecture = "SolarOpenForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekMoe.defaults,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "head_dim": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    }
    bias_of_key = AttentionBias.qkv

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        for key in ("num_nextn_predict_layers", "first_k_dense_replace"):
            keys.only(key, 0)
        keys.only("use_qk_norm", False)
        return super()._read_ffn(keys, cfg)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_ffn(cfg) | {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0}
