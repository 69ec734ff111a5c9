"""Mellum 2 (arXiv 2605.31268): Qwen3-MoE with windows in some blocks, which have a rotary embedding of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, GqaConfig, ModelConfig, QkNorm
from moefoundry.conversion.families.family import ffn_width, with_dense_layers
from moefoundry.conversion.families.glm4_moe import read_dense, write_layer_types
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama
from moefoundry.conversion.families.llama_moe import LlamaMoe
from moefoundry.conversion.families.qwen import Qwen3Moe
from moefoundry.conversion.families.rope_scaling import KINDS, NEW, OLD, read_ropes, write_ropes
from moefoundry.conversion.families.windows import read_windows, write_windows

THETAS = dict(zip(KINDS, (5e5, 1e4), strict=True))


class Mellum(LlamaMoe):
    """Mellum 2."""

    name = "mellum"
    architecture = "MellumForCausalLM"
    absent = "prediction of further tokens"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
        "sliding_window": 1024,
    }
    width_key = "moe_intermediate_size"
    balance = Qwen3Moe.balance

    def left_out(self, cfg: ModelConfig) -> dict[str, str]:
        return {"mtp.": "prediction of further tokens"}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        keys.assume(NEW, {kind: {"rope_theta": theta} for kind, theta in THETAS.items()})
        keys.skip("use_sliding_window", "max_window_layers")  # layer_types says it
        of_all, of_windows = read_ropes(keys)
        attention = replace(self._read_gqa(keys, of_all), qk_norm=QkNorm.head)
        return read_windows(keys, attention, of_windows, every=None)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        keys = super()._write_attention(cfg) | write_windows(cfg) | {NEW: write_ropes(cfg.attention)}
        del keys[OLD], keys["rope_theta"]  # which it has not
        return keys

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        for name in ("num_mtp_layers", "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"):
            keys.skip(name)
        dense = read_dense(keys, cfg.n_layers) if keys.has("mlp_layer_types") else []
        keys.skip("intermediate_size")
        width = keys.size("intermediate_size") if dense else None
        return with_dense_layers(replace(super()._read_ffn(keys, cfg), ffn_hidden_size=width), dense)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        more = {"intermediate_size": ffn_width(cfg), "mlp_layer_types": write_layer_types(cfg)}
        return super()._write_ffn(cfg) | more
