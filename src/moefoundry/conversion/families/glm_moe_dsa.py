"""GLM-5 and 5.1: DeepSeek-V3.2, whose indexers turn neighbours; here halves turn, so that rows change places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import MlaConfig, ModelConfig
from moefoundry.conversion.families.deepseek_v32 import DeepseekV32
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys

TURNED = {"q_proj", "k_proj", "k_norm_weight", "k_norm_bias"}
"""Tensors of an indexer whose rows, of each head, are turned up to the width of a rotary embedding."""


class GlmMoeDsa(DeepseekV32):
    """GLM-5. Each block chooses keys of its own; later models, in which some take another's, are refused."""

    name = "glm_moe_dsa"
    architecture = "GlmMoeDsaForCausalLM"
    absent = "blocks that take the keys that another has chosen"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekV32.defaults,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 2048,
        "n_group": 1,
        "topk_group": 1,
        "index_n_heads": 32,
    }

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.only("indexer_rope_interleave", True)
        keys.only("indexer_types", ["full"] * cfg.n_layers)
        keys.only("index_topk_freq", 1)
        keys.only("index_topk_pattern", None)
        keys.skip("index_skip_topk_offset")  # has no effect with that frequency
        return super()._read_ffn(keys, cfg)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_ffn(cfg) | {"indexer_rope_interleave": True, "indexer_types": ["full"] * cfg.n_layers}

    def _layer(self, cfg: ModelConfig, ours: str, theirs: str, dense: bool) -> Iterator[Piece]:
        for piece in super()._layer(cfg, ours, theirs, dense):
            module, _, name = piece.name.rpartition(".")
            yield from _turned(piece, cfg) if module.endswith(".indexer") and name in TURNED else (piece,)


def _turned(piece: Piece, cfg: ModelConfig) -> Iterator[Piece]:
    """Yield the rows of each head: those of even number first, then those of odd number, and the rest as it is."""
    assert isinstance(cfg.attention, MlaConfig)
    assert cfg.attention.indexer is not None
    turned, width = cfg.attention.qk_rope_head_dim, cfg.attention.indexer.head_dim
    heads = cfg.attention.indexer.n_heads if piece.name.endswith("q_proj") else 1
    for first in range(0, heads * width, width):
        for row in range(turned):
            ours = first + row // 2 + (turned // 2 if row % 2 else 0)
            yield replace(piece, rows=(first + row, first + row + 1), our_rows=(ours, ours + 1))
        if turned < width:
            rest = first + turned, first + width
            yield replace(piece, rows=rest, our_rows=rest)
