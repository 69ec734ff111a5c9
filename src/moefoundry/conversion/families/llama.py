"""Llama, which is dense, and the frame of most other families: these differ in attention and FFN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionBias,
    AttentionConfig,
    GqaConfig,
    InitConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    QkNorm,
)
from moefoundry.conversion.families.family import Family, Piece, dense_layers, ffn_width
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.rope_scaling import Rope, read_rope, write_scaling

FFN = ("gate_proj", "up_proj", "down_proj")


class Llama(Family):
    """Llama."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    absent = "biases of the FFN"
    defaults: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    bias_of_key: ClassVar[AttentionBias | None] = AttentionBias.all  # of attention_bias: true; None has no such key
    partial_rotation: ClassVar[bool] = False  # the config has partial_rotary_factor
    block_norms: ClassVar[tuple[str, str]] = ("input_layernorm", "post_attention_layernorm")  # of attention and FFN
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    head_norms: ClassVar[tuple[str, str]] = ("q_norm", "k_norm")

    # ---------------------------------------------------------------------------------------------------------- config

    def _read(self, keys: Keys) -> ModelConfig:
        cfg = ModelConfig(
            vocab_size=keys.size("vocab_size"),
            d_model=keys.size("hidden_size"),
            n_layers=keys.size("num_hidden_layers"),
            norm=NormConfig(eps=keys.number("rms_norm_eps")),
            tie_embeddings=keys.flag("tie_word_embeddings"),
            init=InitConfig(std=keys.number("initializer_range")),
            attention=self._read_attention(keys),
        )
        keys.only("hidden_act", "silu")
        self._read_dropout(keys)
        return self._read_ffn(keys, self._read_layer_types(keys, cfg))

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.d_model,
            "num_hidden_layers": cfg.n_layers,
            "rms_norm_eps": cfg.norm.eps,
            "tie_word_embeddings": cfg.tie_embeddings,
            "initializer_range": cfg.init.std,
            "hidden_act": "silu",
            **self._write_attention(cfg),
            **self._write_ffn(cfg),
        }

    def _read_dropout(self, keys: Keys) -> None:
        """Read the dropout, of which there is none here."""
        keys.only("attention_dropout", 0.0)

    def _read_layer_types(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        """Read the kinds of the blocks' attention; here the same again, in files of later versions."""
        keys.only("layer_types", layer_types(cfg.attention, cfg.n_layers))
        return cfg

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        return self._read_gqa(keys)

    def _read_gqa(self, keys: Keys, rope: Rope | None = None) -> GqaConfig:
        """Read grouped-query attention, and its rotary embedding unless that is read already."""
        n_heads, d_model = keys.size("num_attention_heads"), keys.size("hidden_size")
        head_dim = keys.size("head_dim") if keys.has("head_dim") else None
        if self.bias_of_key is None:
            keys.only("attention_bias", False)
        rope = rope or read_rope(keys, partial=self.partial_rotation)
        return GqaConfig(
            n_heads=n_heads,
            n_kv_heads=keys.size("num_key_value_heads") if keys.has("num_key_value_heads") else n_heads,
            head_dim=None if head_dim == d_model // n_heads else head_dim,
            bias=self.bias_of_key if self.bias_of_key and keys.flag("attention_bias") else AttentionBias.none,
            rotary_fraction=rope.fraction,
            **rope.keys,
        )

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        keys = {
            "num_attention_heads": cfg.attention.n_heads,
            "num_key_value_heads": cfg.attention.n_kv_heads,
            "head_dim": cfg.attention.head_dim or cfg.d_model // cfg.attention.n_heads,
            "rope_theta": cfg.attention.rope_theta,
            "rope_scaling": write_scaling(cfg.attention),
        }
        if self.bias_of_key is not None:
            keys["attention_bias"] = cfg.attention.bias == self.bias_of_key
        if self.partial_rotation:
            keys["partial_rotary_factor"] = cfg.attention.rotary_fraction
        return keys

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.only("mlp_bias", False)
        width = keys.size("intermediate_size")
        one_expert = MoEConfig(num_experts=1, top_k=1, expert_hidden_size=width)  # in none of the blocks
        return replace(cfg, n_dense_layers=cfg.n_layers, ffn_hidden_size=width, moe=one_expert)

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"intermediate_size": ffn_width(cfg)}

    # --------------------------------------------------------------------------------------------------------- tensors

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        dense = dense_layers(cfg)
        yield Piece("embed_tokens.weight", self.embedding)
        for index in range(cfg.n_layers):
            yield from self._block(cfg, index, index in dense)
        yield Piece("norm.weight", "model.norm.weight")
        if not cfg.tie_embeddings:
            yield Piece("lm_head.weight", "lm_head.weight")

    def copies(self, cfg: ModelConfig) -> dict[str, str]:
        return {"lm_head.weight": self.embedding} if cfg.tie_embeddings else {}

    def _block(self, cfg: ModelConfig, index: int, dense: bool) -> Iterator[Piece]:
        """Yield the pieces of one of the model's own blocks."""
        return self._layer(cfg, f"layers.{index}", f"model.layers.{index}", dense)

    def _layer(self, cfg: ModelConfig, ours: str, theirs: str, dense: bool) -> Iterator[Piece]:
        yield Piece(f"{ours}.attention_norm.weight", f"{theirs}.{self.block_norms[0]}.weight")
        for name, hf_name in self._attention_tensors(cfg):
            yield Piece(f"{ours}.attention.{name}", f"{theirs}.self_attn.{hf_name}")
        yield Piece(f"{ours}.ffn_norm.weight", f"{theirs}.{self.block_norms[1]}.weight")
        yield from ffn(f"{ours}.ffn", f"{theirs}.mlp") if dense else self._moe(cfg, f"{ours}.ffn", theirs)

    def _attention_tensors(self, cfg: ModelConfig) -> Iterator[tuple[str, str]]:
        assert isinstance(cfg.attention, GqaConfig)
        bias = cfg.attention.bias
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{projection}.weight", f"{projection}.weight"
            if bias == AttentionBias.all or (bias == AttentionBias.qkv and projection != "o_proj"):
                yield f"{projection}.bias", f"{projection}.bias"
        if cfg.attention.sinks:
            yield "sinks", "sinks"
        if cfg.attention.qk_norm != QkNorm.none:
            yield "q_norm.weight", f"{self.head_norms[0]}.weight"
            yield "k_norm.weight", f"{self.head_norms[1]}.weight"

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        """Yield the pieces of the MoE layer ``ours`` in the block ``theirs``."""
        return experts(cfg, ours, f"{theirs}.mlp")


def layer_types(attention: AttentionConfig, n_layers: int) -> list[str]:
    """List the blocks as transformers does, by whether they have a window."""
    windows = (attention.window_of(index) for index in range(n_layers))
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def windowed_blocks(keys: Keys, n_layers: int) -> list[int]:
    """Read the indices of the blocks with a window from ``layer_types``."""
    kinds = keys.texts("layer_types", "full_attention", "sliding_attention")
    if len(kinds) != n_layers:
        keys.refuse("layer_types", f"a list of {n_layers}")
    return [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]


def ffn(ours: str, theirs: str) -> Iterator[Piece]:
    """Yield the pieces of a dense FFN, or of shared experts."""
    for projection in FFN:
        yield Piece(f"{ours}.{projection}.weight", f"{theirs}.{projection}.weight")


def experts(
    cfg: ModelConfig, ours: str, theirs: str, names: tuple[str, str, str] = FFN, gate: str = "gate"
) -> Iterator[Piece]:
    """Yield the pieces of a router's ``gate`` and of experts that are modules there.

    Args:
        cfg: The model.
        ours: The MoE layer here.
        theirs: The MoE layer there.
        names: Names of an expert's gate, up and down projection.
        gate: Name of the router's module.
    """
    yield Piece(f"{ours}.router.gate.weight", f"{theirs}.{gate}.weight")
    for expert in range(cfg.moe.num_experts):
        for projection, name in zip(FFN, names, strict=True):
            hf_name = f"{theirs}.experts.{expert}.{name}.weight"
            yield Piece(f"{ours}.experts.{projection}", hf_name, expert=expert)
