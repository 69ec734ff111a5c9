"""ERNIE-4.5 (text): softmax scores with an expert bias, shared experts, interleaved RoPE in grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import (
    AttentionConfig,
    AuxLossScope,
    BalanceConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    ScoreFunction,
)
from moefoundry.conversion.families.family import Piece, dense_layers, ffn_width, loss_weight, with_dense_layers
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.llama import Llama, experts, ffn

FIXED = {"moe_norm_min": 1e-12, "moe_gate": "topk", "moe_use_aux_free": True, "use_rmsnorm": True}
BIAS_RATE = 0.001  # of an expert bias, which softmax scores have only where it is updated


class Ernie45Moe(Llama):
    """ERNIE-4.5 with experts in a range of blocks."""

    name = "ernie4_5_moe"
    architecture = "Ernie4_5_MoeForCausalLM"
    absent = "biases of projections; prediction of further tokens"
    defaults: ClassVar[dict[str, Any]] = {
        **Llama.defaults,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    }
    bias_of_key = None
    names_in_memory: ClassVar[dict[str, str]] = {".mlp.moe_statics.": ".mlp.gate.moe_statics."}

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Return an expert bias, and a loss of a mean over layers beside it."""
        weight = loss_weight(hf, "router_aux_loss_coef", 0.001) / cfg.n_layers
        return BalanceConfig(weight, AuxLossScope.micro_batch, z_loss_weight=0.0, bias_update_rate=BIAS_RATE)

    def left_out(self, cfg: ModelConfig) -> dict[str, str]:
        return {"model.mtp_": "the module that predicts a further token"}

    def fits(self, cfg: ModelConfig) -> list[str]:
        balance = cfg.moe.balance
        if balance.bias_update_rate > 0:  # at whatever rate
            cfg = replace(cfg, moe=replace(cfg.moe, balance=replace(balance, bias_update_rate=BIAS_RATE)))
        return super().fits(cfg)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        keys.only("use_bias", False)
        return replace(self._read_gqa(keys), rotary_interleaved=True)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("moe_num_experts", "num_experts")
        keys.alias("moe_k", "num_experts_per_tok")
        for key, value in FIXED.items():
            keys.only(key, value)
        keys.skip("num_nextn_predict_layers", "moe_capacity")  # a capacity that only training has
        moe = MoEConfig(
            num_experts=keys.size("moe_num_experts"),
            top_k=keys.size("moe_k"),
            expert_hidden_size=keys.size("moe_intermediate_size"),
            num_shared_experts=keys.count("moe_num_shared_experts"),
            router=RouterConfig(ScoreFunction.softmax),
            balance=BalanceConfig(bias_update_rate=BIAS_RATE),
        )
        return with_dense_layers(
            replace(cfg, ffn_hidden_size=keys.size("intermediate_size"), moe=moe), _read_dense(keys, cfg.n_layers)
        )

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        sparse = sorted({*range(cfg.n_layers)} - {*dense_layers(cfg)}) or [cfg.n_layers]  # a range behind the last
        return {
            "intermediate_size": ffn_width(cfg),
            "moe_num_experts": cfg.moe.num_experts,
            "moe_k": cfg.moe.top_k,
            "moe_intermediate_size": cfg.moe.expert_hidden_size,
            "moe_num_shared_experts": cfg.moe.num_shared_experts,
            "moe_layer_start_index": sparse[0],
            "moe_layer_end_index": sparse[-1],
            "moe_layer_interval": 1,
            "use_bias": False,
        }

    def _moe(self, cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
        bias = f"{theirs}.mlp.moe_statics.e_score_correction_bias"
        yield Piece(f"{ours}.router.expert_bias", bias, part=0)  # [1, E] there
        yield from experts(cfg, ours, f"{theirs}.mlp")
        if cfg.moe.num_shared_experts:
            yield from ffn(f"{ours}.shared_experts", f"{theirs}.mlp.shared_experts")


def _read_dense(keys: Keys, n_layers: int) -> list[int]:
    first, step = keys.count("moe_layer_start_index"), keys.size("moe_layer_interval")
    if not keys.stated("moe_layer_end_index") or keys.is_value("moe_layer_end_index", -1):
        last = n_layers - 1
        keys.skip("moe_layer_end_index")
    else:
        last = keys.count("moe_layer_end_index")
    return [index for index in range(n_layers) if not first <= index <= last or (index + 1) % step]
