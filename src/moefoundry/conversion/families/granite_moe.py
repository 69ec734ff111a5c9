"""Granite-MoE: Mixtral with constant factors on embeddings, residuals, attention and logits, and fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, GqaConfig, ModelConfig, MultipliersConfig, RouterConfig
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama
from moefoundry.conversion.families.llama_moe import LlamaMoe

FACTORS = {"embedding": "embedding_multiplier", "residual": "residual_multiplier", "logits_divisor": "logits_scaling"}


class GraniteMoe(LlamaMoe):
    """Granite-MoE: the weights of the top k are normalized."""

    name = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    absent = "dropout of the attention, of which the published files speak"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        **dict.fromkeys(FACTORS.values(), 1.0),
        "attention_multiplier": 1.0,
    }
    count_keys = ("num_local_experts", "num_experts")
    names_in_memory: ClassVar[dict[str, str]] = {
        "router.layer.weight": "router.weight",
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
    }

    def _read(self, keys: Keys) -> ModelConfig:
        keys.only("activation_function", "silu")
        keys.only("router_jitter_noise", 0.0)
        factors = MultipliersConfig(**{name: keys.number(key) for name, key in FACTORS.items()})
        return replace(super()._read(keys), multipliers=factors)

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write(cfg) | {key: getattr(cfg.multipliers, name) for name, key in FACTORS.items()}

    def _read_dropout(self, keys: Keys) -> None:
        keys.skip("attention_dropout")

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        width = keys.size("hidden_size") // keys.size("num_attention_heads") or 1
        keys.only("head_dim", width)
        scale = keys.number("attention_multiplier")
        return replace(self._read_gqa(keys), head_dim=None, softmax_scale=None if scale == width**-0.5 else scale)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        scale = cfg.attention.softmax_scale or cfg.attention.head_width(cfg.d_model) ** -0.5
        keys = super()._write_attention(cfg) | {"attention_multiplier": scale}
        del keys["head_dim"]  # always d_model / n_heads there
        return keys

    def _read_router(self, keys: Keys) -> RouterConfig:
        return RouterConfig()

    def _write_router(self, router: RouterConfig) -> dict[str, Any]:
        return {}

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        moe, width = f"{theirs}.block_sparse_moe", cfg.moe.expert_hidden_size
        yield Piece(f"{ours}.router.gate.weight", f"{moe}.router.layer.weight")
        for expert in range(cfg.moe.num_experts):
            halves = {"gate_proj": (0, width), "up_proj": (width, 2 * width)}
            for projection, rows in halves.items():
                hf_name = f"{moe}.input_linear.weight"
                yield Piece(f"{ours}.experts.{projection}", hf_name, expert=expert, rows=rows, part=expert)
            hf_name = f"{moe}.output_linear.weight"
            yield Piece(f"{ours}.experts.down_proj", hf_name, expert=expert, part=expert)
