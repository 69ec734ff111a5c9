"""DeepSeek-V3.2: DeepSeek-V3 whose queries see the best keys alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, IndexerConfig, MlaConfig, ModelConfig
from moefoundry.conversion.families.deepseek_v3 import DeepseekV3
from moefoundry.conversion.families.glm4_moe import Glm4MoeLite
from moefoundry.conversion.families.keys import Keys

KEYS = {"top_k": "index_topk", "n_heads": "index_n_heads", "head_dim": "index_head_dim"}
ALL = "indexed_attention"  # the kind of every block, as transformers writes
TENSORS = {
    "q_proj": "wq_b.weight",
    "k_proj": "wk.weight",
    "k_norm_weight": "k_norm.weight",
    "k_norm_bias": "k_norm.bias",
    "head_proj": "weights_proj.weight",
}


class DeepseekV32(Glm4MoeLite):
    """DeepSeek-V3.2, and V3.2-Exp. Sequences of up to ``index_topk`` tokens are dense, as in DeepSeek-V3."""

    name = "deepseek_v32"
    architecture = "DeepseekV32ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekV3.defaults,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    }

    def read_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Read as usual; transformers writes ``first_k_dense_replace`` beside a list that says otherwise."""
        kinds, n_layers = hf.get("layer_types"), hf.get("num_hidden_layers")
        said = {
            "layer_types": isinstance(kinds, list) and len(kinds) == n_layers and {*map(str, kinds)} == {ALL},
            "first_k_dense_replace": bool(hf.get("mlp_layer_types")),
        }
        return super().read_config({key: value for key, value in hf.items() if not said.get(key)})

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        sizes: dict[str, Any] = {name: keys.size(key) for name, key in KEYS.items()}
        keys.only("mlp_bias", False)
        attention = super()._read_attention(keys)
        assert isinstance(attention, MlaConfig)
        return replace(attention, indexer=IndexerConfig(**sizes))

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, MlaConfig)
        indexer = cfg.attention.indexer or IndexerConfig()
        return super()._write_attention(cfg) | {key: getattr(indexer, name) for name, key in KEYS.items()}

    def _attention_tensors(self, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
        yield from super()._attention_tensors(cfg)
        for ours, theirs in TENSORS.items():
            yield f"indexer.{ours}", f"indexer.{theirs}"
