"""Qwen1.5-MoE and Qwen2-MoE: shared experts behind a gate, and biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionBias, AttentionConfig, GqaConfig, ModelConfig
from moefoundry.conversion.families.family import Piece, dense_layers
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import FFN, Llama, ffn
from moefoundry.conversion.families.llama_moe import LlamaMoe
from moefoundry.conversion.families.qwen import Qwen3Moe

WIDTH = "shared_expert_intermediate_size"


class Qwen2Moe(Qwen3Moe):
    """Qwen2-MoE. A model without shared experts, as one made from Qwen2.5, has them with width 0 there."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    absent = "a window"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "num_key_value_heads": 16,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    }
    bias_of_key: ClassVar[AttentionBias | None] = None
    balance = LlamaMoe.balance

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        keys.only("qkv_bias", True)
        keys.only("use_sliding_window", False)  # the versions of transformers have it in different layers
        keys.skip("sliding_window", "max_window_layers")
        return replace(self._read_gqa(keys), bias=AttentionBias.qkv)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return Llama._write_attention(self, cfg) | {"use_sliding_window": False, "qkv_bias": True}

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        cfg = super()._read_ffn(keys, cfg)
        count, rest = divmod(keys.count(WIDTH), cfg.moe.expert_hidden_size)
        if rest and keys.has(WIDTH):
            keys.refuse(WIDTH, f"a multiple of {cfg.moe.expert_hidden_size}, the width of a routed expert")
        return replace(cfg, moe=replace(cfg.moe, num_shared_experts=count, shared_expert_gate=count > 0))

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_ffn(cfg) | {WIDTH: cfg.moe.num_shared_experts * cfg.moe.expert_hidden_size}

    def unused_tensors(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        if cfg.moe.num_shared_experts:
            return {}
        shapes = dict(zip(FFN, ((0, cfg.d_model), (0, cfg.d_model), (cfg.d_model, 0)), strict=True))
        names = {f"shared_expert.{name}.weight": shape for name, shape in shapes.items()}
        names["shared_expert_gate.weight"] = (1, cfg.d_model)
        sparse = {*range(cfg.n_layers)} - {*dense_layers(cfg)}
        return {f"model.layers.{i}.mlp.{name}": shape for i in sorted(sparse) for name, shape in names.items()}

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        yield from super()._moe(cfg, ours, theirs)
        if cfg.moe.num_shared_experts:
            yield from ffn(f"{ours}.shared_experts", f"{theirs}.mlp.shared_expert")
            yield Piece(f"{ours}.shared_gate.weight", f"{theirs}.mlp.shared_expert_gate.weight")
