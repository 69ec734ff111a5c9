"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, softmax scores, groups judged by their best expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moefoundry.config import AuxLossScope, BalanceConfig, ModelConfig, ScoreFunction
from moefoundry.conversion.families.deepseek_v3 import DeepseekV3
from moefoundry.conversion.families.family import loss_weight
from moefoundry.conversion.families.keys import Keys

METHODS = ("greedy", "group_limited_greedy")


class DeepseekV2(DeepseekV3):
    """DeepSeek-V2. The weights of the top k are scaled, and not normalized: transformers reads no key for that."""

    name = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    absent = "balance losses of devices and of communication"
    defaults: ClassVar[dict[str, Any]] = {
        **DeepseekV3.defaults,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "first_k_dense_replace": 0,
    }
    score_function = ScoreFunction.softmax

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Balance within each sequence; the paper's losses of devices and of communication are not there."""
        return BalanceConfig(loss_weight(hf, "aux_loss_alpha", 0.001), AuxLossScope.sequence, z_loss_weight=0.0)

    def _read_ffn(self, keys: Keys, cfg: ModelConfig) -> ModelConfig:
        keys.alias("n_routed_experts", "num_experts")
        keys.only("norm_topk_prob", False)
        keys.only("num_nextn_predict_layers", 0)
        keys.only("mlp_bias", False)
        return super()._read_ffn(keys, cfg)

    def _read_groups(self, keys: Keys) -> tuple[int, int]:
        if keys.text("topk_method", *METHODS) == METHODS[1]:
            return keys.size("n_group"), keys.size("topk_group")
        keys.skip("n_group", "topk_group")
        return 1, 1

    def _write_ffn(self, cfg: ModelConfig) -> dict[str, Any]:
        limited = cfg.moe.router.num_groups > 1
        own = {"topk_method": METHODS[limited], "norm_topk_prob": False, "num_nextn_predict_layers": 0}
        return super()._write_ffn(cfg) | own
