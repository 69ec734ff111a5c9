"""Qwen3, dense: Llama with RMSNorm of each query and key head, and perhaps a sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, ModelConfig, QkNorm
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama
from moefoundry.conversion.families.qwen2 import Qwen2, read_window, write_window


class Qwen3(Llama):
    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Qwen2.defaults, "head_dim": 128}
    published: ClassVar[tuple[str, dict[str, Any]]] = (
        "Qwen3-8B",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
        },
    )

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        return replace(self._read_gqa(keys), qk_norm=QkNorm.head, sliding_window=read_window(keys))

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_attention(cfg) | write_window(cfg)
