"""Qwen3-MoE: the attention of Qwen3, fine-grained experts, and dense layers anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from moefoundry.config import AttentionConfig, AuxLossScope, BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from moefoundry.conversion.families.family import dense_layers, ffn_width, with_dense_layers
from moefoundry.conversion.families.keys import Keys
from moefoundry.conversion.families.qwen2 import Qwen2
from moefoundry.conversion.families.qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        **Qwen2.defaults,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    }

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Over the global batch (arXiv 2501.11873)."""
        return BalanceConfig(hf.get("router_aux_loss_coef", 0.001), AuxLossScope.global_batch, z_loss_weight=0.0)

    def _read_attention(self, keys: Keys) -> AttentionConfig:
        if keys.has("rope_parameters") and keys.flag("use_sliding_window"):
            keys.assume("max_window_layers", 0)  # transformers 5 has the window in every layer, whatever the key says
            keys.only("max_window_layers", 0)
        return super()._read_attention(keys)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("num_experts", "num_local_experts")
        step = keys.size("decoder_sparse_step")
        dense = keys.indices("mlp_only_layers") if keys.has("mlp_only_layers") else []
        moe = MoEConfig(
            num_experts=keys.size("num_experts"),
            top_k=keys.size("num_experts_per_tok"),
            expert_hidden_size=keys.size("moe_intermediate_size"),
            num_shared_experts=0,
            router=RouterConfig(normalize_topk=keys.flag("norm_topk_prob")),
        )
        cfg = replace(cfg, moe=moe, ffn_hidden_size=keys.size("intermediate_size"))
        return with_dense_layers(cfg, [i for i in range(cfg.n_layers) if i in dense or (i + 1) % step])

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": ffn_width(cfg),
            "moe_intermediate_size": cfg.moe.expert_hidden_size,
            "num_experts": cfg.moe.num_experts,
            "num_experts_per_tok": cfg.moe.top_k,
            "norm_topk_prob": cfg.moe.router.normalize_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(cfg),
        }
