"""Qwen: Qwen2 and Qwen2.5, Qwen3, and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionBias,
    AttentionConfig,
    AuxLossScope,
    BalanceConfig,
    GqaConfig,
    ModelConfig,
    QkNorm,
)
from moefoundry.conversion.families.family import dense_layers, ffn_width, loss_weight, with_dense_layers
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, layer_types, windowed_blocks
from moefoundry.conversion.families.llama_moe import LlamaMoe


class Qwen2(Llama):
    """Llama with biases of queries, keys and values, and perhaps a sliding window."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
    bias_of_key: ClassVar[AttentionBias | None] = None
    qkv_bias: ClassVar[AttentionBias | None] = AttentionBias.qkv
    qk_norm: ClassVar[QkNorm] = QkNorm.none

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        keys.only("use_mrope", False)
        window, layers = self._read_window(keys)
        attention = replace(
            self._read_gqa(keys), qk_norm=self.qk_norm, sliding_window=window, sliding_window_layers=layers
        )
        return attention if self.qkv_bias is None else replace(attention, bias=self.qkv_bias)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        window, layers = cfg.attention.sliding_window, cfg.attention.sliding_window_layers
        keys: dict[str, Any] = {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0,
        }
        if layers is not None:
            keys |= {"max_window_layers": min(layers), "layer_types": layer_types(cfg.attention, cfg.n_layers)}
        return super()._write_attention(cfg) | keys

    def _read_window(self, keys: Keys) -> tuple[int | None, list[int] | None]:
        """Read the sliding window and its blocks: those from ``max_window_layers`` on, or as ``layer_types`` says."""
        first, n_layers = keys.count("max_window_layers"), keys.size("num_hidden_layers")
        keys.skip("sliding_window")  # whatever it is, where it is not used
        listed = keys.stated("layer_types")
        if not (keys.flag("use_sliding_window") and keys.has("sliding_window") and (listed or first < n_layers)):
            return None, None
        blocks = windowed_blocks(keys, n_layers) if listed else list(range(first, n_layers))
        if not blocks:
            return None, None
        return keys.size("sliding_window"), None if len(blocks) == n_layers else blocks


class Qwen3(Qwen2):
    """Llama with RMSNorm of each query and key head, and perhaps a sliding window."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Qwen2.defaults, "head_dim": 128}
    bias_of_key: ClassVar[AttentionBias | None] = AttentionBias.all
    qkv_bias = None
    qk_norm = QkNorm.head


class Qwen3Moe(Qwen3, LlamaMoe):
    """Qwen3-MoE: the attention of Qwen3, fine-grained experts, and dense layers anywhere."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {**Qwen2.defaults, "decoder_sparse_step": 1, "norm_topk_prob": False}
    width_key = "moe_intermediate_size"

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Balance over the global batch (arXiv 2501.11873)."""
        return BalanceConfig(
            loss_weight(hf, "router_aux_loss_coef", 0.001), AuxLossScope.global_batch, z_loss_weight=0.0
        )

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        if keys.has("rope_parameters") and keys.flag("use_sliding_window"):
            keys.assume("max_window_layers", 0)  # transformers 5 has the window in every layer, whatever the key says
            keys.only("max_window_layers", 0)
        return super()._read_attention(keys)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        keys = super()._write_attention(cfg)
        keys.pop("layer_types", None)  # which transformers does not read of this family
        return keys | ({"max_window_layers": 0} if keys["use_sliding_window"] else {})

    def _read_window(self, keys: Keys) -> tuple[int | None, list[int] | None]:
        first, n_layers = keys.count("max_window_layers"), keys.size("num_hidden_layers")
        if keys.flag("use_sliding_window") and keys.has("sliding_window") and 0 < first < n_layers:
            keys.refuse("max_window_layers", f"0 (a window in every layer), or {n_layers} (in none)")
        window, _ = super()._read_window(keys)
        return window, None

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        step = keys.size("decoder_sparse_step")
        dense = keys.indices("mlp_only_layers") if keys.has("mlp_only_layers") else []
        cfg = replace(super()._read_ffn(keys, cfg), ffn_hidden_size=keys.size("intermediate_size"))
        return with_dense_layers(cfg, [i for i in range(cfg.n_layers) if i in dense or (i + 1) % step])

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        more = {"intermediate_size": ffn_width(cfg), "decoder_sparse_step": 1}
        return super()._write_ffn(cfg) | more | {"mlp_only_layers": dense_layers(cfg)}
