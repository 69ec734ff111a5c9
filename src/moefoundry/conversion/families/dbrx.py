"""DBRX: LayerNorm, clipped queries, keys and values in one matrix, and the experts of a layer in three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from moefoundry.config import (
    AuxLossScope,
    BalanceConfig,
    GqaConfig,
    InitConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    NormKind,
    RouterConfig,
)
from moefoundry.conversion.families.family import Family, Piece, loss_weight
from moefoundry.conversion.families.keys import GENERIC, Keys
from moefoundry.conversion.families.rope_scaling import read_rope

EPS = 1e-5  # torch.nn.LayerNorm's own; the config has no key for it
ATTENTION_DEFAULTS = {"kv_n_heads": 1, "rope_theta": 10000.0}
FFN_DEFAULTS = {"moe_normalize_expert_weights": 1.0}


class Dbrx(Family):
    """DBRX."""

    name = "dbrx"
    architecture = "DbrxForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {"initializer_range": 0.02}
    length_key = "max_seq_len"

    def fits(self, cfg: ModelConfig) -> list[str]:
        problems = super().fits(cfg)
        if not problems and isinstance(cfg.attention, GqaConfig) and cfg.attention.clip_qkv is None:
            problems.append(
                "model.attention.clip_qkv: null, and transformers runs no dbrx without it; 1e30 clips nothing"
            )
        return problems

    def balance(self, cfg: ModelConfig, hf: Mapping[str, Any]) -> BalanceConfig:
        """Convert a mean over layers."""
        weight = loss_weight(hf, "router_aux_loss_coef", 0.05) / cfg.n_layers
        return BalanceConfig(weight, AuxLossScope.micro_batch, z_loss_weight=0.0)

    def _read(self, keys: Keys) -> ModelConfig:
        attention = keys.nested("attn_config", ATTENTION_DEFAULTS, GENERIC)
        ffn = keys.nested("ffn_config", FFN_DEFAULTS, GENERIC)
        theta, scaling, _ = read_rope(keys, attention)
        keys.only("rope_theta", theta)  # transformers 5 reads it here, transformers 4 in attn_config
        if scaling is not None:
            keys.refuse("rope_parameters" if keys.has("rope_parameters") else "rope_scaling", "no extension")
        for dropout in ("resid_pdrop", "emb_pdrop"):
            keys.only(dropout, 0.0)
        attention.only("attn_pdrop", 0.0)
        keys.only("tie_word_embeddings", False)
        keys.only("num_key_value_heads", attention.size("kv_n_heads"))  # transformers writes it twice
        ffn.only("hidden_size", keys.size("d_model"))  # once more
        ffn.only("ffn_act_fn", {"name": "silu"})
        ffn.only("uniform_expert_assignment", False)
        normalize = ffn.has("moe_normalize_expert_weights")  # null does not
        ffn.only("moe_normalize_expert_weights", 1.0)  # the p of the norm that the weights are divided by
        cfg = ModelConfig(
            vocab_size=keys.size("vocab_size"),
            d_model=keys.size("d_model"),
            n_layers=keys.size("n_layers"),
            n_dense_layers=0,
            norm=NormConfig(kind=NormKind.layernorm, eps=EPS),
            init=InitConfig(std=keys.number("initializer_range")),
            attention=GqaConfig(
                n_heads=keys.size("n_heads"),
                rope_theta=theta,
                n_kv_heads=attention.size("kv_n_heads"),
                clip_qkv=attention.number("clip_qkv") if attention.has("clip_qkv") else None,
            ),
            moe=MoEConfig(
                num_experts=ffn.size("moe_num_experts"),
                top_k=ffn.size("moe_top_k"),
                expert_hidden_size=ffn.size("ffn_hidden_size"),
                num_shared_experts=0,
                router=RouterConfig(
                    normalize_topk=normalize,
                    input_jitter=ffn.number("moe_jitter_eps") if ffn.has("moe_jitter_eps") else 0.0,
                ),
            ),
        )
        attention.finish()
        ffn.finish()
        return cfg

    def _write(self, cfg: ModelConfig) -> dict[str, Any]:
        assert isinstance(cfg.attention, GqaConfig)
        return {
            "vocab_size": cfg.vocab_size,
            "d_model": cfg.d_model,
            "n_heads": cfg.attention.n_heads,
            "n_layers": cfg.n_layers,
            "initializer_range": cfg.init.std,
            "tie_word_embeddings": False,
            "rope_theta": cfg.attention.rope_theta,
            "attn_config": {
                "clip_qkv": cfg.attention.clip_qkv,
                "kv_n_heads": cfg.attention.n_kv_heads,
                "rope_theta": cfg.attention.rope_theta,
            },
            "ffn_config": {
                "ffn_hidden_size": cfg.moe.expert_hidden_size,
                "moe_num_experts": cfg.moe.num_experts,
                "moe_top_k": cfg.moe.top_k,
                "moe_jitter_eps": cfg.moe.router.input_jitter or None,
                "moe_normalize_expert_weights": 1.0 if cfg.moe.router.normalize_topk else None,
            },
        }

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]:
        yield Piece("embed_tokens.weight", "transformer.wte.weight")
        for index in range(cfg.n_layers):
            yield from _layer(cfg, f"layers.{index}", f"transformer.blocks.{index}")
        yield Piece("norm.weight", "transformer.norm_f.weight")
        yield Piece("lm_head.weight", "lm_head.weight")


def _layer(cfg: ModelConfig, ours: str, theirs: str) -> Iterator[Piece]:
    assert isinstance(cfg.attention, GqaConfig)
    yield Piece(f"{ours}.attention_norm.weight", f"{theirs}.norm_attn_norm.norm_1.weight")
    key_width = cfg.d_model // cfg.attention.n_heads * cfg.attention.n_kv_heads
    first = 0
    for projection, width in (("q_proj", cfg.d_model), ("k_proj", key_width), ("v_proj", key_width)):
        hf_name = f"{theirs}.norm_attn_norm.attn.Wqkv.weight"
        yield Piece(f"{ours}.attention.{projection}.weight", hf_name, rows=(first, first + width))
        first += width
    yield Piece(f"{ours}.attention.o_proj.weight", f"{theirs}.norm_attn_norm.attn.out_proj.weight")
    yield Piece(f"{ours}.ffn_norm.weight", f"{theirs}.norm_attn_norm.norm_2.weight")
    yield Piece(f"{ours}.ffn.router.gate.weight", f"{theirs}.ffn.router.layer.weight")
    width = cfg.moe.expert_hidden_size
    for projection, name in (("gate_proj", "w1"), ("up_proj", "v1"), ("down_proj", "w2")):
        for expert in range(cfg.moe.num_experts):
            yield Piece(
                f"{ours}.ffn.experts.{projection}",
                f"{theirs}.ffn.experts.mlp.{name}",
                expert=expert,
                rows=(expert * width, (expert + 1) * width),
                transposed=projection == "down_proj",  # [F, D] there
            )
