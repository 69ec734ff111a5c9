"""Latent attention beside DeepSeek's experts: DeepSeek-V3 (arXiv 2412.19437), Moonlight and Kimi K2, and GLM-4.7-Flash.

RoPE is interleaved there as here, so no weight is permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, MlaConfig, ModelConfig
from moefoundry.conversion.families.deepseek_moe import DeepseekMoe
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.rope_scaling import read_rope, write_scaling


class DeepseekV3(DeepseekMoe):
    """DeepSeek-V3."""

    name = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    attention_kind = "mla"
    defaults: ClassVar[dict[str, Any]] = {**DeepseekMoe.defaults, "q_lora_rank": 1536}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        attention = MlaConfig(
            n_heads=keys.size("num_attention_heads"),
            q_lora_rank=keys.size("q_lora_rank") if keys.has("q_lora_rank") else None,
            kv_lora_rank=keys.size("kv_lora_rank"),
            qk_nope_head_dim=keys.size("qk_nope_head_dim"),
            qk_rope_head_dim=keys.size("qk_rope_head_dim"),
            v_head_dim=keys.size("v_head_dim"),
            **read_rope(keys).keys,
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
            "rope_scaling": write_scaling(cfg.attention),
            "q_lora_rank": cfg.attention.q_lora_rank,
            "kv_lora_rank": cfg.attention.kv_lora_rank,
            "qk_nope_head_dim": cfg.attention.qk_nope_head_dim,
            "qk_rope_head_dim": cfg.attention.qk_rope_head_dim,
            "v_head_dim": cfg.attention.v_head_dim,
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
