"""Exported tensors have the names, the number and the sizes of the published files, which other engines load by name.

The facts are those of each model's ``model.safetensors.index.json``: ``#`` is a number, braces are alternatives, and
bytes are ``metadata.total_size`` of a model in BF16.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.tensor_map import Dtype, TensorMap
from moefoundry.model.transformer import meta_model

LAYER = "model.layers.#."
ENDS = "{model.embed_tokens,model.norm,lm_head}.weight"
NORMS = f"{LAYER}{{input,post_attention}}_layernorm.weight"
GQA = f"{LAYER}self_attn.{{q,k,v,o}}_proj.weight"
QKV_BIAS = f"{LAYER}self_attn.{{q,k,v}}_proj.bias"
QK_NORM = f"{LAYER}self_attn.{{q,k}}_norm.weight"
MLA = f"{LAYER}self_attn.{{q_a_proj,q_a_layernorm,q_b_proj,kv_a_proj_with_mqa,kv_a_layernorm,kv_b_proj,o_proj}}.weight"
FFN = "{gate,up,down}_proj.weight"
DENSE = f"{LAYER}mlp.{FFN}"
EXPERTS = f"{LAYER}mlp.{{gate.weight,experts.#.{FFN}}}"
SHARED = f"{LAYER}mlp.{{shared_experts.{FFN},gate.e_score_correction_bias}}"
MTP = f"{LAYER}{{enorm,hnorm,eh_proj,shared_head.{{norm,head}},embed_tokens}}.weight"
MIXTRAL = f"{LAYER}block_sparse_moe.{{gate,experts.#.w{{1,2,3}}}}.weight"
GRANITE = f"{LAYER}block_sparse_moe.{{router.layer,input_linear,output_linear}}.weight"
DBRX = [
    "transformer.{wte,norm_f,blocks.#.{norm_attn_norm.{norm_1,norm_2,attn.{Wqkv,out_proj}},ffn.router.layer}}.weight",
    "transformer.blocks.#.ffn.experts.mlp.{w1,v1,w2}",
    "lm_head.weight",
]
LING = f"{LAYER}attention.{{{{query_key_value,dense}}.weight,{{query,key}}_layernorm.weight}}"

SHARED_EXPERT = f"{LAYER}mlp.{{shared_expert.{FFN},shared_expert_gate.weight}}"
OF_QWEN3_NEXT = [ENDS, NORMS, GQA, QK_NORM, EXPERTS, SHARED_EXPERT]
LINEAR = f"{LAYER}linear_attn.{{A_log,dt_bias,{{conv1d,norm,out_proj}}.weight}}"
MODULE = [
    "mtp.{fc,norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight",
    *(name.replace("model.", "mtp.") for name in (NORMS, GQA, QK_NORM, EXPERTS, SHARED_EXPERT)),
]

FACTS: dict[str, tuple[int | None, int | None, list[str]]] = {
    "llama": (291, 13476831232, [ENDS, NORMS, GQA, DENSE]),
    "qwen2": (339, 15231233024, [ENDS, NORMS, GQA, QKV_BIAS, DENSE]),
    "qwen3": (399, 16381470720, [ENDS, NORMS, GQA, QK_NORM, DENSE]),
    "mixtral": (995, 93405585408, [ENDS, NORMS, GQA, MIXTRAL]),
    "olmoe": (3219, 13838323712, [ENDS, NORMS, GQA, QK_NORM, EXPERTS]),
    "qwen3_moe": (18867, 61064245248, [ENDS, NORMS, GQA, QK_NORM, EXPERTS]),
    "qwen2_moe": (
        4659,
        28631568384,
        [ENDS, NORMS, GQA, QKV_BIAS, EXPERTS, f"{LAYER}mlp.{{shared_expert.{FFN},shared_expert_gate.weight}}"],
    ),
    "dbrx": (323, 263193047040, DBRX),
    "deepseek_v3": (None, None, [ENDS, NORMS, MLA, DENSE, EXPERTS, SHARED, MTP]),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"),
        (
            None,
            None,
            [
                *(ENDS, NORMS, MLA, DENSE, EXPERTS, SHARED, MTP),
                f"{LAYER}self_attn.indexer.{{{{wq_b,wk,k_norm,weights_proj}}.weight,k_norm.bias}}",
            ],
        ),
    ),
    "deepseek_v2": (None, None, [ENDS, NORMS, MLA, DENSE, EXPERTS, f"{LAYER}mlp.shared_experts.{FFN}"]),
    "glm4_moe": (None, None, [ENDS, NORMS, GQA, QKV_BIAS, QK_NORM, DENSE, EXPERTS, SHARED, MTP]),
    "glm4_moe_lite": (None, None, [ENDS, NORMS, MLA, DENSE, EXPERTS, SHARED, MTP]),
    "dots1": (None, None, [ENDS, NORMS, GQA, QK_NORM, DENSE, EXPERTS, SHARED]),
    "solar_open": (None, None, [ENDS, NORMS, GQA, EXPERTS, SHARED]),
    "granitemoe": (None, None, ["model.{embed_tokens,norm}.weight", NORMS, GQA, GRANITE]),
    "minimax_m2": (
        None,
        None,
        [ENDS, NORMS, GQA, QK_NORM, MIXTRAL, f"{LAYER}block_sparse_moe.e_score_correction_bias"],
    ),
    "ernie4_5_moe": (
        None,
        None,
        [
            *("model.{embed_tokens,norm}.weight", NORMS, GQA, DENSE, EXPERTS, f"{LAYER}mlp.shared_experts.{FFN}"),
            f"{LAYER}mlp.moe_statics.e_score_correction_bias",
        ],
    ),
    "gpt_oss": (
        None,
        None,
        [
            *(ENDS, NORMS, f"{LAYER}self_attn.{{{{q,k,v,o}}_proj.{{weight,bias}},sinks}}"),
            f"{LAYER}mlp.{{router.{{weight,bias}},experts.{{gate_up_proj,down_proj}}{{,_bias}}}}",
        ],
    ),
    "qwen3_next": (
        None,
        None,
        [*OF_QWEN3_NEXT, LINEAR, f"{LAYER}linear_attn.{{in_proj_qkvz,in_proj_ba}}.weight", *MODULE],
    ),
    "qwen3_5_moe_text": (
        None,
        None,
        [*OF_QWEN3_NEXT, LINEAR, f"{LAYER}linear_attn.in_proj_{{qkv,z,b,a}}.weight", *MODULE],
    ),
    "phimoe": (
        None,
        None,
        [
            ENDS,
            "{model.norm,lm_head}.bias",
            f"{LAYER}{{input,post_attention}}_layernorm.{{weight,bias}}",
            f"{LAYER}self_attn.{{q,k,v,o}}_proj.{{weight,bias}}",
            MIXTRAL,
        ],
    ),
    "mellum": (None, None, [ENDS, NORMS, GQA, QK_NORM, EXPERTS]),
    "exaone_moe": (
        None,
        None,
        [
            *(ENDS, NORMS, GQA, QK_NORM, DENSE, EXPERTS),
            f"{LAYER}mlp.{{shared_experts.{FFN},e_score_correction_bias}}",
        ],
    ),
    "afmoe": (
        None,
        None,
        [
            *(ENDS, NORMS, GQA, QK_NORM, DENSE),
            f"{LAYER}{{pre,post}}_mlp_layernorm.weight",
            f"{LAYER}self_attn.gate_proj.weight",
            f"{LAYER}mlp.{{router.gate.weight,expert_bias,{{shared_experts,experts.#}}.{FFN}}}",
        ],
    ),
    **dict.fromkeys(
        ("olmo2", "olmo3"),
        (355, None, [ENDS, f"{LAYER}post_{{attention,feedforward}}_layernorm.weight", GQA, QK_NORM, DENSE]),
    ),
    "flex_olmo": (
        None,
        None,
        [ENDS, f"{LAYER}post_{{attention,feedforward}}_layernorm.weight", GQA, QK_NORM, EXPERTS],
    ),
    "hunyuan_v1_moe": (
        None,
        None,
        [
            *("model.{embed_tokens,norm}.weight", NORMS, GQA, f"{LAYER}self_attn.{{query,key}}_layernorm.weight"),
            f"{LAYER}mlp.{{gate.wg.weight,experts.#.{FFN},shared_mlp.{FFN}}}",
        ],
    ),
    "hy_v3": (
        None,
        None,
        [
            *(ENDS, NORMS, GQA, QK_NORM, DENSE),
            f"{LAYER}mlp.{{router.gate.weight,expert_bias,experts.#.{FFN},shared_mlp.{FFN}}}",
        ],
    ),
    **dict.fromkeys(
        ("sarvam_moe", "bailing_moe"),
        (
            None,
            None,
            [
                *("model.{word_embeddings,norm}.weight", "lm_head.weight", NORMS, LING, DENSE, EXPERTS),
                f"{LAYER}mlp.{{shared_experts.{FFN},gate.expert_bias}}",
            ],
        ),
    ),
}


def alternatives(text: str) -> Iterator[str]:
    """Each way to read the braces, from the innermost on."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        yield text
        return
    for choice in found[1].split(","):
        yield from alternatives(text[: found.start()] + choice + text[found.end() :])


def test_every_family_has_its_facts() -> None:
    assert FACTS.keys() == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_number_and_size_are_those_of_the_published_files(family: str) -> None:
    number, nbytes, names = FACTS[family]
    cfg = FAMILIES[family].read_config(FAMILIES[family].published[1])
    if number is None:  # names alone are known: fewer tensors have them, too
        router = replace(cfg.moe.router, num_groups=1, top_k_groups=1)
        layers = (
            cfg.n_dense_layers + 1 if cfg.linear_attention is None else cfg.linear_attention.full_attention_interval
        )
        cfg = replace(cfg, n_layers=layers, moe=replace(cfg.moe, num_experts=16, router=router))
    ours = {name: TensorSpec(tuple(t.shape), torch.bfloat16) for name, t in meta_model(cfg).state_dict().items()}
    specs = TensorMap(FAMILIES[family], cfg).their_specs(ours, Dtype.keep)
    assert {re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in specs} == {
        name for pattern in names for name in alternatives(pattern)
    }
    assert number in (None, len(specs))
    assert nbytes in (None, sum(spec.nbytes for spec in specs.values()))
