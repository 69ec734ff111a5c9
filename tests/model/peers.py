"""Transformers' models and attention layers with our weights, for comparison number by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moefoundry.config import GqaConfig, MlaConfig, ModelConfig, RouterConfig, ScoreFunction, YarnConfig
from moefoundry.conversion.families.rope_scaling import write_yarn
from moefoundry.model.transformer import MoETransformer
from tests.model.tiny import tiny_config, tiny_model

TO_1E_5 = {"rtol": 0, "atol": 1e-5}
Renames = Sequence[tuple[str, str]]
MLA_NAMES: Renames = (("kv_a_proj", "kv_a_proj_with_mqa"), ("_a_norm", "_a_layernorm"))
BLOCK_NAMES: Renames = (
    ("layers.", "model.layers."),
    ("embed_tokens", "model.embed_tokens"),
    ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    (".attention.", ".self_attn."),
)
LLAMA_NAMES: Renames = (*BLOCK_NAMES, (".ffn.", ".mlp."))
MIXTRAL_NAMES: Renames = (
    *BLOCK_NAMES,
    (".ffn.router.", ".block_sparse_moe."),
    (".ffn.experts.gate_proj", ".block_sparse_moe.experts.{e}.w1.weight"),
    (".ffn.experts.up_proj", ".block_sparse_moe.experts.{e}.w3.weight"),
    (".ffn.experts.down_proj", ".block_sparse_moe.experts.{e}.w2.weight"),
)
DEEPSEEK_NAMES: Renames = (
    *BLOCK_NAMES,
    *MLA_NAMES,
    (".ffn.router.gate.", ".mlp.gate."),
    (".ffn.router.expert_bias", ".mlp.gate.e_score_correction_bias"),
    (".ffn.experts.gate_proj", ".mlp.experts.{e}.gate_proj.weight"),
    (".ffn.experts.up_proj", ".mlp.experts.{e}.up_proj.weight"),
    (".ffn.experts.down_proj", ".mlp.experts.{e}.down_proj.weight"),
    (".ffn.", ".mlp."),
)


def matched(ours: nn.Module, theirs: nn.Module, names: Renames) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(our name, our tensor, theirs), one for each tensor of ``theirs``; experts are slices of ours."""
    remaining = theirs.state_dict(keep_vars=True)
    for name, tensor in ours.state_dict(keep_vars=True).items():
        template = f"model.{name}" if name == "norm.weight" else name
        for our_part, their_part in names:
            template = template.replace(our_part, their_part)
        if "{e}" in template:
            for expert, part in enumerate(tensor):
                yield name, part, remaining.pop(template.format(e=expert))
        else:
            yield name, tensor, remaining.pop(template)
    assert not remaining, list(remaining)


@torch.no_grad()
def give_weights(ours: nn.Module, theirs: nn.Module, names: Renames) -> nn.Module:
    """Copy our weights into ``theirs``."""
    for _, value, copy in matched(ours, theirs, names):
        copy.copy_(value)
    return theirs


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, names: Renames) -> None:
    """Of every parameter, to 1e-5."""
    grads = {name: p.grad for name, p in ours.named_parameters()}
    parts: dict[str, list[Tensor]] = {}
    for name, _, copy in matched(ours, theirs, names):
        if isinstance(copy, nn.Parameter):
            assert copy.grad is not None, name
            parts.setdefault(name, []).append(copy.grad)
    assert parts.keys() == grads.keys()
    for name, grad in grads.items():
        expected = torch.stack(parts[name]).view_as(grad)
        torch.testing.assert_close(grad, expected, **TO_1E_5, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_model(ours: MoETransformer, theirs: nn.Module, ids: Tensor, names: Renames) -> None:
    """Logits, and the gradients of the loss, to 1e-5."""
    torch.testing.assert_close(ours(ids), theirs(ids).logits, **TO_1E_5)
    ours(ids, ids).lm.backward()
    theirs(ids, labels=ids).loss.backward()
    assert_same_gradients(ours, theirs, names)


def max_positions(yarn: YarnConfig | None) -> int:
    """transformers takes the factor from the ratio of this and the original length."""
    return 4096 if yarn is None else round(yarn.factor * yarn.original_max_seq_len)


def _common(cfg: ModelConfig) -> dict[str, object]:
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.attention.n_heads,
        "rms_norm_eps": cfg.norm.eps,
        "rope_theta": cfg.attention.rope_theta,
        "rope_scaling": write_yarn(cfg.attention.yarn),
        "max_position_embeddings": max_positions(cfg.attention.yarn),
        "attn_implementation": "eager",
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def llama(attention: GqaConfig) -> tuple[MoETransformer, nn.Module]:
    """Our dense model, and Llama with its weights."""
    cfg = tiny_config(n_layers=2, n_dense_layers=2)
    cfg.attention = attention
    their_config = LlamaConfig(
        intermediate_size=cfg.ffn_hidden_size, num_key_value_heads=attention.n_kv_heads, **_common(cfg)
    )
    model = tiny_model(cfg).eval()
    return model, give_weights(model, LlamaForCausalLM(their_config).eval(), LLAMA_NAMES)


def mixtral(attention: GqaConfig) -> tuple[MoETransformer, nn.Module]:
    """Our model without a dense layer, and Mixtral with its weights."""
    cfg = tiny_config(n_layers=2, n_dense_layers=0, num_shared_experts=0)
    cfg.attention = attention
    their_config = MixtralConfig(
        intermediate_size=cfg.moe.expert_hidden_size,
        num_local_experts=cfg.moe.num_experts,
        num_experts_per_tok=cfg.moe.top_k,
        num_key_value_heads=attention.n_kv_heads,
        sliding_window=attention.sliding_window,
        **_common(cfg),
    )
    model = tiny_model(cfg).eval()
    return model, give_weights(model, MixtralForCausalLM(their_config).eval(), MIXTRAL_NAMES)


def deepseek_v3(attention: MlaConfig) -> tuple[MoETransformer, nn.Module]:
    """Our model with sigmoid routing, and DeepSeek-V3 with its weights."""
    cfg = tiny_config(n_layers=2)
    cfg.attention = attention
    cfg.moe.router = RouterConfig(score_function=ScoreFunction.sigmoid, scale=2.5)
    model = tiny_model(cfg).eval()
    their_config = DeepseekV3Config(
        intermediate_size=cfg.ffn_hidden_size,
        moe_intermediate_size=cfg.moe.expert_hidden_size,
        n_routed_experts=cfg.moe.num_experts,
        num_experts_per_tok=cfg.moe.top_k,
        n_shared_experts=cfg.moe.num_shared_experts,
        routed_scaling_factor=2.5,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=cfg.n_dense_layers,
        **mla_widths(attention),
        **_common(cfg),
    )
    return model, give_weights(model, DeepseekV3ForCausalLM(their_config).eval(), DEEPSEEK_NAMES)


def mla_widths(cfg: MlaConfig) -> dict[str, object]:
    """transformers' keys of the attention's sizes."""
    return {
        "num_key_value_heads": cfg.n_heads,
        "q_lora_rank": cfg.q_lora_rank,
        "kv_lora_rank": cfg.kv_lora_rank,
        "qk_nope_head_dim": cfg.qk_nope_head_dim,
        "qk_rope_head_dim": cfg.qk_rope_head_dim,
        "v_head_dim": cfg.v_head_dim,
    }


def causal_bias(length: int) -> Tensor:
    """What transformers' layers add to the products, [1, 1, S, S]."""
    return torch.full((length, length), float("-inf")).triu(1)[None, None]
