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

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        return replace(self._read_gqa(keys), qk_norm=QkNorm.head, sliding_window=read_window(keys))

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_attention(cfg) | write_window(cfg)
