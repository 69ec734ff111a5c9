"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and perhaps a sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionBias, AttentionConfig, GqaConfig, ModelConfig
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama


class Qwen2(Llama):
    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    has_attention_bias = False

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        return replace(self._read_gqa(keys), bias=AttentionBias.qkv, sliding_window=read_window(keys))

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_attention(cfg) | write_window(cfg)


def read_window(keys: Keys) -> int | None:
    """The sliding window of all layers. Transformers means it for the layers from ``max_window_layers`` on; a window of
    some layers only is refused."""
    first, n_layers = keys.count("max_window_layers"), keys.size("num_hidden_layers")
    keys.skip("sliding_window")  # whatever it is, where it is not used
    used = keys.flag("use_sliding_window") and keys.has("sliding_window") and first < n_layers
    window = keys.size("sliding_window") if used else None
    if window is not None and first > 0:
        keys.refuse("max_window_layers", f"0 (a window in every layer), or {n_layers} (in none)")
    kind = "full_attention" if window is None else "sliding_attention"
    keys.only("layer_types", [kind] * n_layers)  # the same again, in files of later versions
    return window


def write_window(cfg: ModelConfig) -> dict[str, Any]:
    """What :func:`read_window` reads."""
    assert isinstance(cfg.attention, GqaConfig)
    window = cfg.attention.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
