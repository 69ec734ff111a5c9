"""Qwen3-Next and Qwen3.5-MoE: linear attention in most blocks, gated attention in the others, norms about 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionBias,
    AttentionConfig,
    GqaConfig,
    LinearAttentionConfig,
    ModelConfig,
    MtpConfig,
    QkNorm,
)
from moefoundry.conversion.families.family import Piece
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama
from moefoundry.conversion.families.qwen import Qwen3Moe
from moefoundry.conversion.families.qwen2_moe import Qwen2Moe

FULL, LINEAR = "full_attention", "linear_attention"
INTERVAL = "full_attention_interval"


class Qwen3Next(Qwen2Moe):
    """Qwen3-Next. The projections of linear attention are two tensors there, a head of keys after the other.

    Attributes:
        mtp_key: Key of the number of prediction modules. They share what is before and behind their block there, so
            that there is one at most.
    """

    name = "qwen3_next"
    architecture = "Qwen3NextForCausalLM"
    absent = "a window; more than one prediction module"
    defaults: ClassVar[dict[str, Any]] = {
        **Qwen2Moe.defaults,
        "norm_topk_prob": True,
        "head_dim": 256,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    }
    bias_of_key = AttentionBias.all
    partial_rotation = True
    mtp_key: ClassVar[str] = "num_nextn_predict_layers"
    balance = Qwen3Moe.balance

    # ---------------------------------------------------------------------------------------------------------- config

    def _read(self, keys: Keys) -> ModelConfig:
        cfg = super()._read(keys)
        depth = keys.count(self.mtp_key) if keys.has(self.mtp_key) else 0
        if depth > 1:
            keys.refuse(self.mtp_key, "0 or 1")
        return replace(cfg, norm=replace(cfg.norm, zero_centered=True), mtp=MtpConfig(depth=depth))

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        linear = cfg.linear_attention or LinearAttentionConfig(n_key_heads=1, n_value_heads=1)  # in none of the blocks
        keys = super()._write(cfg) | {
            "layer_types": [LINEAR if cfg.is_linear(index) else FULL for index in range(cfg.n_layers)],
            "linear_conv_kernel_dim": linear.conv_width,
            "linear_key_head_dim": linear.key_head_dim,
            "linear_value_head_dim": linear.value_head_dim,
            "linear_num_key_heads": linear.n_key_heads,
            "linear_num_value_heads": linear.n_value_heads,
        }
        if cfg.linear_attention is not None and linear.layers is None:
            keys[INTERVAL] = linear.full_attention_interval
        return keys | ({self.mtp_key: 1} if cfg.mtp.depth else {})

    def _read_layer_types(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        sizes = LinearAttentionConfig(
            n_key_heads=keys.size("linear_num_key_heads"),
            n_value_heads=keys.size("linear_num_value_heads"),
            key_head_dim=keys.size("linear_key_head_dim"),
            value_head_dim=keys.size("linear_value_head_dim"),
            conv_width=keys.size("linear_conv_kernel_dim"),
        )
        if sizes.n_value_heads % sizes.n_key_heads:
            keys.refuse("linear_num_value_heads", f"a multiple of linear_num_key_heads, {sizes.n_key_heads}")
        stated = keys.texts("layer_types", FULL, LINEAR) if keys.has("layer_types") else None
        if stated is not None and len(stated) != cfg.n_layers:
            keys.refuse("layer_types", f"one for each of {cfg.n_layers} blocks")
        keys.assume(INTERVAL, interval_of(stated) if stated is not None else 4)
        linear = replace(sizes, full_attention_interval=keys.size(INTERVAL))
        if stated is not None and [LINEAR if linear.is_linear(i) else FULL for i in range(len(stated))] != stated:
            linear = replace(sizes, layers=[index for index, kind in enumerate(stated) if kind == LINEAR])
        some = any(linear.is_linear(index) for index in range(cfg.n_layers))
        return replace(cfg, linear_attention=linear if some else None)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        keys.only("attn_output_gate", True)
        keys.only("use_sliding_window", False)
        keys.skip("sliding_window", "max_window_layers", "mamba_ssm_dtype")
        return replace(self._read_gqa(keys), qk_norm=QkNorm.head, output_gate=True)

    def _write_attention(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return Llama._write_attention(self, cfg)

    # --------------------------------------------------------------------------------------------------------- tensors

    def prediction_depth(self, cfg: ModelConfig, tensors: Iterable[str]) -> int:
        return int(any(name.startswith("mtp.") for name in tensors))  # published configs do not say

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        yield from super().pieces(cfg)
        for index in range(cfg.mtp.depth):
            ours, theirs = f"mtp.{index}", "mtp"
            yield Piece(f"{ours}.embedding_norm.weight", f"{theirs}.pre_fc_norm_embedding.weight")
            yield Piece(f"{ours}.hidden_norm.weight", f"{theirs}.pre_fc_norm_hidden.weight")
            yield Piece(f"{ours}.proj.weight", f"{theirs}.fc.weight")
            yield from self._layer(cfg, f"{ours}.block", f"{theirs}.layers.{index}", dense=False)
            yield Piece(f"{ours}.norm.weight", f"{theirs}.norm.weight")

    def _block(self, cfg: ModelConfig, index: int, dense: bool) -> Iterator[Piece]:
        ours, linear = f"layers.{index}.attention", cfg.is_linear(index)
        for piece in super()._block(cfg, index, dense):
            if not (linear and piece.name.startswith(f"{ours}.")):
                yield piece
        if linear:
            assert cfg.linear_attention is not None
            theirs = f"model.layers.{index}.linear_attn"
            for name, hf_name in LINEAR_TENSORS.items():
                yield Piece(f"{ours}.{name}", f"{theirs}.{hf_name}")
            yield from self._projections(cfg.linear_attention, ours, theirs)

    def _projections(self, linear: LinearAttentionConfig, ours: str, theirs: str) -> Iterator[Piece]:
        """Yield the projections, of which each head of keys has its rows together: q, k, v, gate; and beta, decay."""
        values = linear.n_value_heads // linear.n_key_heads
        keys, width = linear.n_key_heads * linear.key_head_dim, values * linear.value_head_dim
        qkv, gate = f"{ours}.qkv_proj.weight", f"{ours}.gate_proj.weight"
        row = 0
        for head in range(linear.n_key_heads):
            key = head * linear.key_head_dim
            parts = [(qkv, key, linear.key_head_dim), (qkv, keys + key, linear.key_head_dim)]
            parts += [(qkv, 2 * keys + head * width, width), (gate, head * width, width)]
            for name, first, rows in parts:
                there = (row, row + rows)
                yield Piece(name, f"{theirs}.in_proj_qkvz.weight", rows=there, our_rows=(first, first + rows))
                row += rows
            for index, name in enumerate(("beta_proj", "decay_proj")):
                first = (2 * head + index) * values
                yield Piece(
                    f"{ours}.{name}.weight",
                    f"{theirs}.in_proj_ba.weight",
                    rows=(first, first + values),
                    our_rows=(head * values, (head + 1) * values),
                )


LINEAR_TENSORS = {
    "conv.weight": "conv1d.weight",
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
    "head_norm.weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
}


def interval_of(types: list[str]) -> int:
    """Find the interval at which full attention comes first; where none has it, one that none reaches."""
    return (*types, FULL).index(FULL) + 1
