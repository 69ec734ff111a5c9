"""OLMo 2 (arXiv 2501.00656), which is dense, and FlexOlmo (arXiv 2507.07024): norms after attention and FFN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, GqaConfig, ModelConfig, NormPosition, QkNorm
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama
from moefoundry.conversion.families.llama_moe import LlamaMoe


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
        keys.only("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))
        return replace(self._read_gqa(keys), qk_norm=QkNorm.full)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        keys = super()._write_attention(cfg)
        del keys["head_dim"]  # always d_model / n_heads there
        return keys


class FlexOlmo(Olmo2, LlamaMoe):
    """FlexOlmo: an OLMo 2 whose experts were trained apart, each on data of its own."""

    name = "flex_olmo"
    architecture = "FlexOlmoForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Llama.defaults, "norm_topk_prob": False, "rope_theta": 5e5}
