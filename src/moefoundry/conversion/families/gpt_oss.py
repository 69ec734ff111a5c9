"""gpt-oss (arXiv 2508.10925): attention sinks, windows in every other block, biases everywhere, and a clamped SwiGLU.

Gate and up of all experts are one tensor there, with their columns in turn, stored transposed. The published weights
are in MXFP4, which ``conversion/mxfp4.py`` reads; BF16 is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionConfig,
    AuxLossScope,
    BalanceConfig,
    GqaConfig,
    ModelConfig,
    RouterConfig,
    SwigluConfig,
)
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, layer_types, windowed_blocks
from moefoundry.conversion.families.llama_moe import LlamaMoe

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(LlamaMoe):
    """gpt-oss."""

    name = "gpt_oss"
    architecture = "GptOssForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }
    count_keys = ("num_local_experts", "num_experts")

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Return a customary loss: how these models were balanced is not published, and the config's 0.9 is unusual."""
        return BalanceConfig(0.001, AuxLossScope.global_batch, z_loss_weight=0.0)

    def _read(self, keys: Keys) -> ModelConfig:
        keys.alias("num_experts_per_tok", "experts_per_token")
        keys.skip("initial_context_length")  # YaRN's original length again
        swiglu = SwigluConfig(keys.number("swiglu_alpha"), keys.number("swiglu_limit"), 1.0)
        return replace(super()._read(keys), swiglu=swiglu)

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        limit = cfg.swiglu.limit or self.defaults["swiglu_limit"]  # there is no other way
        return super()._write(cfg) | {"swiglu_alpha": cfg.swiglu.alpha, "swiglu_limit": limit}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        if not (keys.has("rope_scaling") or keys.has("rope_parameters")):
            keys.assume("rope_scaling", YARN)
        n_layers = keys.size("num_hidden_layers")
        listed = keys.stated("layer_types")
        blocks = windowed_blocks(keys, n_layers) if listed else list(range(0, n_layers, 2))
        attention = replace(self._read_gqa(keys), sinks=True)
        if not blocks:
            keys.skip("sliding_window")
            return attention
        layers = None if len(blocks) == n_layers else blocks
        return replace(attention, sliding_window=keys.size("sliding_window"), sliding_window_layers=layers)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        keys = super()._write_attention(cfg)
        return keys | {
            "rope_scaling": keys["rope_scaling"] or {"rope_type": "default"},  # null would be YaRN there
            "sliding_window": cfg.attention.sliding_window or self.defaults["sliding_window"],  # it must be there
            "layer_types": layer_types(cfg.attention, cfg.n_layers),
        }

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        cfg = super()._read_ffn(keys, cfg)
        return replace(cfg, moe=replace(cfg.moe, projection_bias=True))

    def _read_router(self, keys: Keys) -> RouterConfig:
        return RouterConfig(gate_bias=True)  # the softmax of the best, which is that of all, normalized

    def _write_router(self, router: RouterConfig) -> dict[str, Any]:
        return {}

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        for kind in ("weight", "bias"):
            yield Piece(f"{ours}.router.gate.{kind}", f"{theirs}.mlp.router.{kind}")
        turns = {
            "gate_proj": ("gate_up_proj", (0, 2)),
            "up_proj": ("gate_up_proj", (1, 2)),
            "down_proj": ("down_proj", None),
        }
        for expert in range(cfg.moe.num_experts):
            for projection, (name, columns) in turns.items():
                for end, transposed in (("", True), ("_bias", False)):
                    hf_name = f"{theirs}.mlp.experts.{name}{end}"
                    place = f"{ours}.experts.{projection}{end}"
                    yield Piece(place, hf_name, expert, transposed=transposed, part=expert, columns=columns)
