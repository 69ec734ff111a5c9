"""The experts of DeepSeek-V3 (arXiv 2412.19437), which many later families have beside an attention of their own.

There are sigmoid scores with an expert bias, groups, shared experts, dense first layers, and modules that predict
further tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AuxLossScope,
    BalanceConfig,
    ModelConfig,
    MoEConfig,
    MtpConfig,
    RouterConfig,
    ScoreFunction,
)
from moefoundry.conversion.families.family import Piece, ffn_width, loss_weight, with_dense_layers
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts, ffn


class DeepseekMoe(Llama):
    """Frame of families with such experts."""

    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    }
    score_function: ClassVar[ScoreFunction] = ScoreFunction.sigmoid

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Return an expert bias, and a small loss of each sequence beside it."""
        weight = loss_weight(hf, "aux_loss_alpha", 0.0001)
        return BalanceConfig(weight, AuxLossScope.sequence, z_loss_weight=0.0, bias_update_rate=0.001)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("n_routed_experts", "num_local_experts")
        keys.alias("num_nextn_predict_layers", "num_mtp_layers")
        keys.only("moe_layer_freq", 1)
        keys.only("scoring_func", self.score_function.value)
        num_groups, top_k_groups = self._read_groups(keys)
        moe = MoEConfig(
            num_experts=keys.size("n_routed_experts"),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size("moe_intermediate_size"),
            num_shared_experts=keys.count("n_shared_experts") if keys.has("n_shared_experts") else 0,
            router=RouterConfig(
                score_function=self.score_function,
                normalize_topk=keys.flag("norm_topk_prob"),
                scale=keys.number("routed_scaling_factor"),
                num_groups=num_groups,
                top_k_groups=top_k_groups,
            ),
        )
        mtp = MtpConfig(depth=keys.count("num_nextn_predict_layers"))
        dense = self._read_dense(keys, cfg.n_layers)
        keys.skip("intermediate_size")
        width = keys.size("intermediate_size") if dense else None
        return with_dense_layers(replace(cfg, ffn_hidden_size=width, moe=moe, mtp=mtp), dense)

    def _read_dense(self, keys: Keys, n_layers: int) -> list[int]:
        """Read the indices of the blocks with a dense FFN."""
        return list(range(min(keys.count("first_k_dense_replace"), n_layers)))

    def _read_groups(self, keys: Keys) -> tuple[int, int]:
        """Read the number of expert groups, and of those that a token may reach."""
        keys.only("topk_method", "noaux_tc")
        return keys.size("n_group"), keys.size("topk_group")

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        moe = cfg.moe
        return {
            "intermediate_size": ffn_width(cfg),
            "first_k_dense_replace": cfg.n_dense_layers,
            "moe_layer_freq": 1,
            "moe_intermediate_size": moe.expert_hidden_size,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "n_shared_experts": moe.num_shared_experts,
            "scoring_func": self.score_function.value,
            "topk_method": "noaux_tc",
            "norm_topk_prob": moe.router.normalize_topk,
            "routed_scaling_factor": moe.router.scale,
            "n_group": moe.router.num_groups,
            "topk_group": moe.router.top_k_groups,
            "num_nextn_predict_layers": cfg.mtp.depth,
        }

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        yield from super().pieces(cfg)
        for index, theirs in enumerate(_mtp_layers(cfg)):
            ours = f"mtp.{index}"
            yield Piece(f"{ours}.embedding_norm.weight", f"{theirs}.enorm.weight")
            yield Piece(f"{ours}.hidden_norm.weight", f"{theirs}.hnorm.weight")
            yield Piece(f"{ours}.proj.weight", f"{theirs}.eh_proj.weight")
            yield from self._layer(cfg, f"{ours}.block", theirs, dense=False)
            yield Piece(f"{ours}.norm.weight", f"{theirs}.shared_head.norm.weight")

    def copies(self, cfg: ModelConfig) -> dict[str, str]:
        head = self.embedding if cfg.tie_embeddings else "lm_head.weight"
        found = super().copies(cfg)
        for theirs in _mtp_layers(cfg):
            found[f"{theirs}.embed_tokens.weight"] = self.embedding
            found[f"{theirs}.shared_head.head.weight"] = head
        return found

    def unused_tensors(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        if cfg.moe.num_shared_experts:
            return {}
        shapes = {"gate_proj": (0, cfg.d_model), "up_proj": (0, cfg.d_model), "down_proj": (cfg.d_model, 0)}
        return {
            f"model.layers.{index}.mlp.shared_experts.{name}.weight": shape
            for index in range(cfg.n_dense_layers, cfg.n_layers)
            for name, shape in shapes.items()
        }

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        if cfg.moe.has_expert_bias:
            yield Piece(f"{ours}.router.expert_bias", f"{theirs}.mlp.gate.e_score_correction_bias")
        yield from experts(cfg, ours, f"{theirs}.mlp")
        if cfg.moe.num_shared_experts:
            yield from ffn(f"{ours}.shared_experts", f"{theirs}.mlp.shared_experts")


def _mtp_layers(cfg: ModelConfig) -> list[str]:
    """Name the modules of multi-token prediction; there they follow the model's own layers."""
    return [f"model.layers.{cfg.n_layers + index}" for index in range(cfg.mtp.depth)]
