"""AFMoE (Arcee's Trinity): gated attention, norms before and after, and experts scored as DeepSeek-V3's.

Blocks that see all have no rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionConfig,
    GqaConfig,
    ModelConfig,
    MoEConfig,
    MultipliersConfig,
    NormPosition,
    QkNorm,
    RouterConfig,
    ScoreFunction,
)
from moefoundry.conversion.families.deepseek_moe import DeepseekMoe
from moefoundry.conversion.families.family import Piece, ffn_width, with_dense_layers
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts, ffn
from moefoundry.conversion.families.windows import read_windows, without_rotation, write_windows

NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
}

SERVED = {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}
"""Keys that transformers passes over, and vLLM asks for."""


class Afmoe(Llama):
    """AFMoE."""

    name = "afmoe"
    architecture = "AfmoeForCausalLM"
    absent = ""
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "num_dense_layers": 1,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
        "route_scale": 1.0,
        "global_attn_every_n_layers": 4,
        "sliding_window": 1024,
        "mup_enabled": False,
    }
    bias_of_key = None
    balance = DeepseekMoe.balance

    def _read(self, keys: Keys) -> ModelConfig:
        cfg = super()._read(keys)
        factor = cfg.d_model**0.5 if keys.flag("mup_enabled") else 1.0
        norm = replace(cfg.norm, position=NormPosition.both)
        return replace(cfg, norm=norm, multipliers=MultipliersConfig(embedding=factor))

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write(cfg) | {"mup_enabled": cfg.multipliers.embedding == cfg.d_model**0.5}

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        every = None if keys.stated("layer_types") else keys.size("global_attn_every_n_layers")
        keys.skip("global_attn_every_n_layers")
        attention = replace(self._read_gqa(keys), qk_norm=QkNorm.head, output_gate=True)
        return without_rotation(read_windows(keys, attention, every=every), keys.size("num_hidden_layers"))

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        return super()._write_attention(cfg) | write_windows(cfg)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.only("score_func", "sigmoid")
        keys.only("route_norm", True)
        for key in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
            keys.only(key, 1)
        keys.skip("load_balance_coeff", "use_grouped_mm")
        moe = MoEConfig(
            num_experts=keys.size("num_experts"),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size("moe_intermediate_size"),
            num_shared_experts=keys.count("num_shared_experts"),
            router=RouterConfig(ScoreFunction.sigmoid, scale=keys.number("route_scale")),
        )
        dense = list(range(min(keys.count("num_dense_layers"), cfg.n_layers)))
        keys.skip("intermediate_size")
        width = keys.size("intermediate_size") if dense else None
        return with_dense_layers(replace(cfg, ffn_hidden_size=width, moe=moe), dense)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": ffn_width(cfg),
            "moe_intermediate_size": cfg.moe.expert_hidden_size,
            "num_dense_layers": cfg.n_dense_layers,
            "num_experts": cfg.moe.num_experts,
            "num_experts_per_tok": cfg.moe.top_k,
            "num_shared_experts": cfg.moe.num_shared_experts,
            "route_scale": cfg.moe.router.scale,
            **SERVED,
        }

    def _layer(self, cfg: ModelConfig, ours: str, theirs: str, dense: bool) -> Iterator[Piece]:
        for name, hf_name in NORMS.items():
            yield Piece(f"{ours}.{name}.weight", f"{theirs}.{hf_name}.weight")
        for name, hf_name in self._attention_tensors(cfg):
            if name != "q_proj.weight":
                yield Piece(f"{ours}.attention.{name}", f"{theirs}.self_attn.{hf_name}")
        yield from self._queries_and_gates(cfg, f"{ours}.attention.q_proj.weight", f"{theirs}.self_attn")
        yield from ffn(f"{ours}.ffn", f"{theirs}.mlp") if dense else self._moe(cfg, f"{ours}.ffn", theirs)

    def _queries_and_gates(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        """Yield the pieces of each head: its query and then its gate here, in tensors of their own there."""
        assert isinstance(cfg.attention, GqaConfig)
        width = cfg.attention.head_width(cfg.d_model)
        for head in range(cfg.attention.n_heads):
            for place, name in enumerate(("q_proj", "gate_proj")):
                first = (2 * head + place) * width
                rows, our_rows = (head * width, (head + 1) * width), (first, first + width)
                yield Piece(ours, f"{theirs}.{name}.weight", rows=rows, our_rows=our_rows)

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        yield Piece(f"{ours}.router.expert_bias", f"{theirs}.mlp.expert_bias")
        yield from experts(cfg, ours, f"{theirs}.mlp", gate="router.gate")
        if cfg.moe.num_shared_experts:
            yield from ffn(f"{ours}.shared_experts", f"{theirs}.mlp.shared_experts")
