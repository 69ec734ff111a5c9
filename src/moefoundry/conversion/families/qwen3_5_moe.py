"""Qwen3.5-MoE: Qwen3-Next whose linear attention has its projections apart; published with a vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from moefoundry.config import BalanceConfig, ConfigError, LinearAttentionConfig, ModelConfig, Problem
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.qwen3_next import Qwen3Next

TEXT = "text_config"
TIED = "tie_word_embeddings"
OF_IMAGES = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
OF_PLACES = ("mrope_section", "mrope_interleaved")  # how images turn; of text all positions are one number
FIXED = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


class Qwen35Moe(Qwen3Next):
    """Qwen3.5-MoE's language model. Of a published file, ``qwen3_5_moe``, the vision tower is left out."""

    name = "qwen3_5_moe_text"
    architecture = "Qwen3_5MoeForCausalLM"
    absent = "the vision tower; a window; more than one prediction module"
    defaults: ClassVar[dict[str, Any]] = {**Qwen3Next.defaults, "mtp_use_dedicated_embeddings": False}
    mtp_key: ClassVar[str] = "mtp_num_hidden_layers"
    names_in_memory: ClassVar[dict[str, str]] = {"model.": "model.language_model."}

    def left_out(self, cfg: ModelConfig) -> dict[str, str]:
        return {"model.visual.": "the vision tower"}

    def read_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        return super().read_config(_of_text(hf))

    def max_seq_len(self, hf: Mapping[str, Any]) -> int | None:
        return super().max_seq_len(_of_text(hf))

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Balance over the global batch, as Qwen3-MoE."""
        return super().balance(cfg, _of_text(hf))

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        for key, value in FIXED.items():
            keys.only(key, value)
        keys.assume("intermediate_size", 1)  # of a dense FFN, which no block has
        keys.only(TIED, cfg.tie_embeddings)
        keys.only("mtp_use_dedicated_embeddings", False)
        return super()._read_ffn(keys, cfg)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        keys = super()._write_ffn(cfg)
        return {key: value for key, value in keys.items() if key not in ("intermediate_size", *FIXED)}

    def _projections(self, linear: LinearAttentionConfig, ours: str, theirs: str) -> Iterator[Piece]:
        for name, part in {"qkv_proj": "qkv", "gate_proj": "z", "beta_proj": "b", "decay_proj": "a"}.items():
            yield Piece(f"{ours}.{name}.weight", f"{theirs}.in_proj_{part}.weight")


def _of_text(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Give the config of the language model, whether it is the file or a part of it.

    Raises:
        ConfigError: The part is no mapping, or contradicts the file.
    """
    text = hf.get(TEXT, {})
    if not isinstance(text, dict):
        raise ConfigError([Problem(TEXT, f"got {text!r}", "a mapping")], "Hugging Face config (qwen3_5_moe)")
    outer = {key: value for key, value in hf.items() if key not in (TEXT, *OF_IMAGES)}
    if {TIED} <= text.keys() & outer.keys() and text[TIED] != outer[TIED]:
        problem = Problem(f"{TEXT}.{TIED}", f"got {text[TIED]!r}", f"{outer[TIED]!r}, as {TIED} says")
        raise ConfigError([problem], "Hugging Face config (qwen3_5_moe)")
    found = {**text, **outer}
    rope = found.get("rope_parameters")
    if isinstance(rope, dict):
        found["rope_parameters"] = {key: value for key, value in rope.items() if key not in OF_PLACES}
    return found
