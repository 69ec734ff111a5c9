"""OLMo 2 (arXiv 2501.00656), OLMo 3 (arXiv 2512.13961), FlexOlmo (arXiv 2507.07024): norms after attention and FFN.

OLMo 2 and 3 are dense.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, GqaConfig, ModelConfig, NormPosition, QkNorm
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama
from moefoundry.conversion.families.llama_moe import LlamaMoe
from moefoundry.conversion.families.rope_scaling import KINDS, NEW, OLD, Rope, read_ropes, write_ropes
from moefoundry.conversion.families.windows import read_windows, write_windows


class Olmo2(Llama):
    """OLMo 2: queries and keys are normed over all heads together."""

    name = "olmo2"
    architecture = "Olmo2ForCausalLM"
    absent = ""
    defaults: ClassVar[dict[str, Any]] = {**Llama.defaults, "rms_norm_eps": 1e-5}
    block_norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    def _read(self, keys: Keys) -> ModelConfig:
        cfg = super()._read(keys)
        return replace(cfg, norm=replace(cfg.norm, position=NormPosition.after))

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        return self._read_normed(keys)

    def _read_normed(self, keys: Keys, rope: Rope | None = None) -> GqaConfig:
        keys.only("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
        return replace(self._read_gqa(keys, rope), qk_norm=QkNorm.full)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        keys = super()._write_attention(cfg)
        del keys["head_dim"]  # always d_model / n_heads there
        return keys


class Olmo3(Olmo2):
    """OLMo 3: an OLMo 2 with windows in three of four blocks; only the others' rotary embeddings are extended.

    Both forms of the latter are written where the older one says the same: transformers 4.57 reads no other.
    """

    name = "olmo3"
    architecture = "Olmo3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Olmo2.defaults, "rope_theta": 5e5, "sliding_window": 4096}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        of_all, of_windows = read_ropes(keys)
        return read_windows(keys, self._read_normed(keys, of_all), of_windows)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        keys = super()._write_attention(cfg) | write_windows(cfg) | {NEW: write_ropes(cfg.attention)}
        plain = {"rope_type": "default", "rope_theta": cfg.attention.rope_theta}
        if keys[NEW][KINDS[1]] != plain:
            del keys[OLD], keys["rope_theta"]
        return keys


class FlexOlmo(Olmo2, LlamaMoe):
    """FlexOlmo: an OLMo 2 whose experts were trained apart, each on data of its own."""

    name = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Llama.defaults, "norm_topk_prob": False, "rope_theta": 5e5}
