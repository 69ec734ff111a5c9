"""Tensors of LLM Foundry's MPT, in pieces of ours."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config import AttentionBias, GqaConfig, ModelConfig, QkNorm
from moefoundry.conversion.families.family import Piece, dense_layers

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SEPARATE = ("Wq", "Wk", "Wv")
STACKED = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}
FFN = ("gate_proj", "up_proj", "down_proj")


class MptTensors:
    """Names of an MPT's tensors, as ``MPTForCausalLM`` has them.

    Args:
        fused: Queries, keys and values have one weight, ``Wqkv``.
        ours: The experts are this project's (``ffn_type: moefoundry_moe``), and not [E * F, D].
    """

    def __init__(self, fused: bool = True, ours: bool = False) -> None:
        self._fused = fused
        self._ours = ours

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        """Yield blocks that cover every tensor of both sides."""
        dense = dense_layers(cfg)
        yield Piece("embed_tokens.weight", "transformer.wte.weight")
        for index in range(cfg.n_layers):
            here, there = f"layers.{index}", f"transformer.blocks.{index}"
            yield Piece(f"{here}.attention_norm.weight", f"{there}.norm_1.weight")
            yield from self._attention(cfg, f"{here}.attention", f"{there}.attn")
            yield Piece(f"{here}.ffn_norm.weight", f"{there}.norm_2.weight")
            if index in dense:
                yield from (Piece(f"{here}.ffn.{name}.weight", f"{there}.ffn.{name}.weight") for name in FFN)
            else:
                yield from self._experts(cfg, f"{here}.ffn", f"{there}.ffn")
        yield Piece("norm.weight", "transformer.norm_f.weight")
        if not cfg.tie_embeddings:
            yield Piece("lm_head.weight", "lm_head.weight")

    def copies(self, cfg: ModelConfig) -> dict[str, str]:
        """Map tensors that repeat another to it."""
        return {"lm_head.weight": "transformer.wte.weight"} if cfg.tie_embeddings else {}

    def unused_tensors(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        """There are no tensors without elements."""
        return {}

    def _attention(self, cfg: ModelConfig, here: str, there: str) -> Iterator[Piece]:
        attention = cfg.attention
        assert isinstance(attention, GqaConfig)
        width, kv_width = attention.projection_widths(cfg.d_model)
        kinds = ["weight", "bias"] if attention.bias != AttentionBias.none else ["weight"]
        for kind in kinds:
            first = 0
            for name, alone, rows in zip(PROJECTIONS, SEPARATE, (width, kv_width, kv_width), strict=True):
                if self._fused:
                    yield Piece(f"{here}.{name}.{kind}", f"{there}.Wqkv.{kind}", rows=(first, first + rows))
                else:
                    yield Piece(f"{here}.{name}.{kind}", f"{there}.{alone}.{kind}")
                first += rows
        yield Piece(f"{here}.o_proj.weight", f"{there}.out_proj.weight")
        if attention.bias == AttentionBias.all:
            yield Piece(f"{here}.o_proj.bias", f"{there}.out_proj.bias")
        if attention.qk_norm != QkNorm.none:
            yield Piece(f"{here}.q_norm.weight", f"{there}.q_ln.weight")
            yield Piece(f"{here}.k_norm.weight", f"{there}.k_ln.weight")

    def _experts(self, cfg: ModelConfig, here: str, there: str) -> Iterator[Piece]:
        if self._ours:
            names = [f"experts.{name}" for name in FFN] + ["router.gate.weight"]
            names += ["router.expert_bias"] if cfg.moe.has_expert_bias else []
            names += [f"shared_experts.{name}.weight" for name in FFN] if cfg.moe.num_shared_experts else []
            yield from (Piece(f"{here}.{name}", f"{there}.moe.{name}") for name in names)
            return
        yield Piece(f"{here}.router.gate.weight", f"{there}.router.layer.weight")
        width = cfg.moe.expert_hidden_size
        for expert in range(cfg.moe.num_experts):
            rows = (expert * width, (expert + 1) * width)
            for name, stacked in STACKED.items():
                there_now = f"{there}.experts.mlp.{stacked}"
                yield Piece(f"{here}.experts.{name}", there_now, expert, rows, transposed=name == "down_proj")


class OurTensors:
    """This project's own names, as its model in a recipe of LLM Foundry (``moe_causal_lm``) has them."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        """Yield each tensor as a whole."""
        tied = {"lm_head.weight"} if cfg.tie_embeddings else set()
        yield from (Piece(name, name) for name in self._names if name not in tied)

    def copies(self, cfg: ModelConfig) -> dict[str, str]:
        """Map tensors that repeat another to it."""
        return {"lm_head.weight": "embed_tokens.weight"} if cfg.tie_embeddings else {}

    def unused_tensors(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        """There are no tensors without elements."""
        return {}
