"""K-EXAONE: DeepSeek-V3's experts; blocks with a window, and others that see all and have no rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, ModelConfig, QkNorm
from moefoundry.conversion.families.deepseek_moe import DeepseekMoe
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.glm4_moe import read_dense, write_layer_types
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.windows import read_windows, without_rotation, write_windows

RENAMED = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
NOT_THERE = ("first_k_dense_replace", "moe_layer_freq", "topk_method", "num_nextn_predict_layers")
BIAS = "mlp.gate.e_score_correction_bias"


class ExaoneMoe(DeepseekMoe):
    """K-EXAONE."""

    name = "exaone_moe"
    architecture = "ExaoneMoeForCausalLM"
    absent = "prediction of further tokens"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekMoe.defaults,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }
    bias_of_key = None
    names_in_memory: ClassVar[dict[str, str]] = {".mlp.e_score_correction_bias": f".{BIAS}"}

    def left_out(self, cfg: ModelConfig) -> dict[str, str]:
        return {"mtp.": "prediction of further tokens"}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        every = None if keys.stated("layer_types") else keys.size("sliding_window_pattern")
        keys.skip("sliding_window_pattern")
        attention = read_windows(keys, replace(self._read_gqa(keys), qk_norm=QkNorm.head), every=every)
        return without_rotation(attention, keys.size("num_hidden_layers"))

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        keys = super()._write_attention(cfg) | write_windows(cfg)
        return keys | {"sliding_window": keys["sliding_window"] or self.defaults["sliding_window"]}  # there is no null

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        for ours, theirs in RENAMED.items():
            keys.alias(ours, theirs)
        keys.alias("first_k_dense_replace", "first_last_k_dense_replace")  # its first published name
        cfg = super()._read_ffn(keys, cfg)
        keys.only("is_moe_layer", [not cfg.is_dense(index) for index in range(cfg.n_layers)])
        return replace(cfg, mtp=replace(cfg.mtp, depth=0))

    def _read_dense(self, keys: Keys, n_layers: int) -> list[int]:
        return read_dense(keys, n_layers)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        keys = {RENAMED.get(key, key): value for key, value in super()._write_ffn(cfg).items() if key not in NOT_THERE}
        return keys | {"mlp_layer_types": write_layer_types(cfg)}

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        for piece in super()._moe(cfg, ours, theirs):
            yield replace(piece, hf_name=piece.hf_name.replace(BIAS, "mlp.e_score_correction_bias"))
