"""GLM-4.5, 4.6 and 4.7 (arXiv 2508.06471), and GLM-4.7-Flash: DeepSeek-V3's experts, and two kinds of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionBias, AttentionConfig, GqaConfig, ModelConfig, QkNorm
from moefoundry.conversion.families.deepseek_moe import DeepseekMoe
from moefoundry.conversion.families.deepseek_v3 import DeepseekV3
from moefoundry.conversion.families.family import dense_layers
from moefoundry.conversion.families.keys import Keys

LAYER_TYPES = ("dense", "sparse")


class Glm4Moe(DeepseekMoe):
    """GLM-4.5: half of each head turns, queries, keys and values have biases, heads may be normed."""

    name = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekMoe.defaults,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    }
    bias_of_key = AttentionBias.qkv
    partial_rotation = True

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        return replace(self._read_gqa(keys), qk_norm=QkNorm.head if keys.flag("use_qk_norm") else QkNorm.none)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return super()._write_attention(cfg) | {"use_qk_norm": cfg.attention.qk_norm == QkNorm.head}


class Glm4MoeLite(DeepseekV3):
    """GLM-4.7-Flash: DeepSeek-V3 with a list of its dense blocks."""

    name = "glm4_moe_lite"
    architecture = "Glm4MoeLiteForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekV3.defaults,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }

    def _read_dense(self, keys: Keys, n_layers: int) -> list[int]:
        return read_dense(keys, n_layers)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_ffn(cfg) | {"mlp_layer_types": write_layer_types(cfg)}


def read_dense(keys: Keys, n_layers: int) -> list[int]:
    """Read the indices of the blocks with a dense FFN from ``mlp_layer_types``, or else ``first_k_dense_replace``."""
    if not keys.has("mlp_layer_types"):
        return list(range(min(keys.count("first_k_dense_replace"), n_layers)))
    types = keys.texts("mlp_layer_types", *LAYER_TYPES)
    if len(types) != n_layers:
        keys.refuse("mlp_layer_types", f"one for each of {n_layers} blocks")
    dense = [index for index, name in enumerate(types) if name == LAYER_TYPES[0]]
    keys.skip("first_k_dense_replace")
    if keys.stated("first_k_dense_replace"):
        keys.only("first_k_dense_replace", next(n for n, index in enumerate([*dense, -1]) if n != index))
    return dense


def write_layer_types(cfg: ModelConfig) -> list[str]:
    """Write ``mlp_layer_types``."""
    dense = dense_layers(cfg)
    return [LAYER_TYPES[index not in dense] for index in range(cfg.n_layers)]
