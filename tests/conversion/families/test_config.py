"""Configs: both ways without a loss, strictly, and with transformers' own defaults."""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig

from moefoundry.config import (
    Assignment,
    BalanceConfig,
    ConfigError,
    ModelConfig,
    MtpConfig,
    RouterConfig,
    UserError,
    load_recipe,
)
from moefoundry.conversion.families import FAMILIES, family_for, family_of
from tests.conftest import QUICKSTART
from tests.conversion.families.models import (
    CASES,
    DBRX,
    GQA,
    MLA,
    NOT_NORMALIZED,
    OLDER,
    OLDER_CASES,
    VARIANTS,
    YARN,
    deepseek,
    experts,
    sizes,
    sparse,
)
from tests.conversion.families.published import PUBLISHED, SAY_THE_SAME

BIASED = replace(VARIANTS["olmoe"]["plain"], moe=replace(experts(), balance=BalanceConfig(bias_update_rate=0.1)))
DEALT = replace(VARIANTS["qwen3_moe"]["plain"], moe=experts(RouterConfig(assignment=Assignment.uniform)))


def written(family: str, variant: str = "plain") -> dict:
    return FAMILIES[family].write_config(VARIANTS[family][variant], max_seq_len=64)


def refused(family: str, **changes: object) -> str:
    config = written(family)
    for key, value in changes.items():
        target, name = (config[f"{key[:-2]}_config"], value[0]) if key in ("attn__", "ffn__") else (config, key)
        target[name] = value[1] if key in ("attn__", "ffn__") else value
    with pytest.raises(ConfigError) as error:
        FAMILIES[family].read_config(config)
    return str(error.value)


@pytest.mark.parametrize(("family", "variant"), CASES, ids=["-".join(case) for case in CASES])
def test_a_written_config_reads_back_equal(family: str, variant: str) -> None:
    cfg = VARIANTS[family][variant]
    config = json.loads(json.dumps(written(family, variant)))
    assert family_of(config).read_config(config) == cfg


@pytest.mark.parametrize(("family", "variant"), OLDER_CASES, ids=["-".join(case) for case in OLDER_CASES])
def test_what_transformers_saves_reads_back_equal(family: str, variant: str) -> None:
    """Its files have more keys than ours, and defaults filled in."""
    config = written(family, variant)
    saved = json.loads(AutoConfig.for_model(**config).to_json_string(use_diff=True))
    assert FAMILIES[family].read_config(saved) == VARIANTS[family][variant]


@pytest.mark.parametrize("family", OLDER)
def test_keys_left_out_have_transformers_defaults(family: str) -> None:
    given = sizes(family, written(family))
    filled = json.loads(AutoConfig.for_model(family, **given).to_json_string(use_diff=True))
    assert filled.keys() > given.keys()
    assert FAMILIES[family].read_config({"model_type": family, **given}) == FAMILIES[family].read_config(filled)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    family = family_of(PUBLISHED[name])
    cfg = family.read_config(PUBLISHED[name])
    assert family.fits(cfg) == []
    assert family_for(cfg) is family or family.name in SAY_THE_SAME
    assert family.max_seq_len(PUBLISHED[name]) in (4096, 8192, 32768, 131072, 163840, 196608, 202752, 262144)
    assert family.read_config(family.write_config(cfg, 1)) == cfg


def test_jitter_is_read_and_written() -> None:
    cfg = sparse(GQA, RouterConfig(input_jitter=0.01))
    assert FAMILIES["mixtral"].write_config(cfg, 64)["router_jitter_noise"] == 0.01
    assert FAMILIES["dbrx"].read_config(PUBLISHED["dbrx-132b"]).moe.router.input_jitter == 0.01


def test_the_length_is_written_and_with_yarn_is_the_one_that_gives_transformers_the_factor() -> None:
    assert written("mixtral")["max_position_embeddings"] == 64
    assert written("dbrx")["max_seq_len"] == 64
    assert written("mixtral", "yarn")["max_position_embeddings"] == 128 == YARN.factor * YARN.original_max_seq_len


def test_sparse_steps_and_dense_layers_of_qwen() -> None:
    config = written("qwen3_moe") | {"num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [1, 6]}
    cfg = FAMILIES["qwen3_moe"].read_config(config)  # layers 1, 3 and 5 would be sparse, and 1 is not
    assert (cfg.n_dense_layers, cfg.dense_layers) == (3, [4, 6])
    written_again = FAMILIES["qwen3_moe"].write_config(cfg, 64)
    assert (written_again["decoder_sparse_step"], written_again["mlp_only_layers"]) == (1, [0, 1, 2, 4, 6])


def test_blocks_with_a_window() -> None:
    """The later ones of Qwen's, by the older key; or any that ``layer_types`` names."""
    config = written("qwen2") | {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4}
    read = FAMILIES["qwen2"].read_config
    some = read(config | {"max_window_layers": 3})
    assert [some.attention.window_of(block) for block in range(5)] == [None, None, None, 8, None]
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    listed = read(config | {"max_window_layers": 1, "layer_types": kinds})
    assert [listed.attention.window_of(block) for block in range(4)] == [8, None, None, 8]
    again = FAMILIES["qwen2"].write_config(listed, 64)
    assert (again["max_window_layers"], again["layer_types"]) == (0, kinds)
    assert read(config | {"max_window_layers": 0}).attention.sliding_window_layers is None
    assert read(config | {"max_window_layers": 4}).attention.sliding_window is None
    every = replace(listed, attention=replace(listed.attention, sliding_window_layers=[3, 2, 1, 0]))
    assert FAMILIES["qwen2"].fits(every) == []
    assert FAMILIES["mixtral"].fits(sparse(replace(GQA, sliding_window=5, sliding_window_layers=[1]))) == [
        "model.attention.sliding_window_layers: [1], and mixtral has None"
    ]


@pytest.mark.parametrize(
    ("family", "changes", "culprit"),
    [
        ("mixtral", {"attention_dropout": 0.1}, "attention_dropout: got 0.1; allowed: 0.0"),
        ("mixtral", {"attention_bias": True}, "attention_bias: got true; allowed: false"),
        ("mixtral", {"hidden_act": "gelu"}, 'hidden_act: got "gelu"; allowed: "silu"'),
        ("mixtral", {"new_option": 3}, "new_option: got 3, and this key is not known here"),
        ("mixtral", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.quant_method"),
        ("llama", {"mlp_bias": True}, "mlp_bias: got true; allowed: false"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, 'rope_scaling.rope_type: got "dynamic"'),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 8.0}}, 'rope_scaling.type: got "linear"'),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: missing"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}},
            "rope_scaling.truncate: got 1; allowed: true or false",
        ),
        ("llama", {"hidden_size": "big"}, 'hidden_size: got "big"; allowed: an integer of at least 1'),
        ("llama", {"vocab_size": None}, "vocab_size: missing"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "max_window_layers: got 1; allowed: 0 (a window in every layer), or 2 (in none)",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
            'layer_types: got ["sliding_attention"]; allowed: a list of 2',
        ),
        (
            "gpt_oss",
            {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            'layer_types: got ["full_attention", "chunked_attention", "full_attention"]; allowed: a list of full_',
        ),
        ("gpt_oss", {"swiglu_limit": "big"}, 'swiglu_limit: got "big"; allowed: a number of at least 0'),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, 'layer_types: got ["full_attention", "sli'),
        ("olmoe", {"head_dim": 16}, "head_dim: got 16; allowed: 8"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: got 2; allowed: 1"),
        ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func: got "softmax"; allowed: "sigmoid"'),
        ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method: got "greedy"; allowed: "noaux_tc"'),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: got false; allowed: true"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads: got 2; allowed: 4"),
        ("dbrx", {"resid_pdrop": 0.1}, "resid_pdrop: got 0.1"),
        ("dbrx", {"attn__": ("attn_pdrop", 0.1)}, "attn_config.attn_pdrop: got 0.1; allowed: 0.0"),
        (
            "dbrx",
            {"ffn__": ("ffn_act_fn", {"name": "gelu"})},
            'ffn_config.ffn_act_fn: got {"name": "gelu"}; allowed: {"name": "silu"}',
        ),
        ("dbrx", {"ffn__": ("moe_normalize_expert_weights", 2)}, "ffn_config.moe_normalize_expert_weights: got 2"),
        ("dbrx", {"ffn__": ("uniform_expert_assignment", True)}, "ffn_config.uniform_expert_assignment: got true"),
        ("dbrx", {"ffn__": ("other", 1)}, "ffn_config.other: got 1, and this key is not known here"),
    ],
)
def test_what_would_be_another_model_is_refused(family: str, changes: dict, culprit: str) -> None:
    assert culprit in refused(family, **changes)


def test_all_problems_of_a_config_are_named_at_once() -> None:
    text = refused("mixtral", attention_dropout=0.1, hidden_act="gelu", zebra=1)
    assert text.startswith("Hugging Face config (mixtral): 3 errors\n")
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "hidden_act",
        "attention_dropout",
        "zebra",
    ]


def test_rotary_embeddings_that_a_family_has_not_are_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    text = refused("olmo3", rope_parameters={"sliding_attention": yarn})
    assert "rope_parameters.sliding_attention: got " in text
    assert text.endswith("allowed: no extension, or what full_attention says")
    assert "rope_theta: got 10000.0; allowed: 500000.0, as rope_parameters" in refused("olmo3", rope_theta=1e4)
    longrope = FAMILIES["phimoe"].write_config(VARIANTS["phimoe"]["longrope"], 64)["rope_scaling"]
    assert 'rope_scaling.rope_type: got "longrope"; allowed: yarn, llama3' in refused("mixtral", rope_scaling=longrope)
    assert 'rope_scaling.rope_type: got "yarn"; allowed: longrope, default' in refused("phimoe", rope_scaling=yarn)
    assert "rope_scaling.long_factor: got [0]" in refused("phimoe", rope_scaling=longrope | {"long_factor": [0]})
    assert "num_experts_per_tok: got 3; allowed: 2" in refused("phimoe", num_experts_per_tok=3)


def test_an_unknown_model_type_is_named_with_those_there_are() -> None:
    for other in ("qwen2_vl", "deepseek_vl", "jamba"):  # whose names are near to some here, and whose models are not
        with pytest.raises(UserError, match=rf"model_type '{other}' is not among the families: llama, .*, dbrx, .*$"):
            family_of({"model_type": other})
    with pytest.raises(UserError, match=r"; did you mean 'qwen3_moe'\?"):
        family_of({"model_type": "Qwen3-MoE"})
    assert family_of({"model_type": "kimi_k2"}).name == "deepseek_v3"
    with pytest.raises(UserError, match="model_type None"):
        family_of({})


@pytest.mark.parametrize(
    ("family", "cfg", "reason"),
    [
        ("mixtral", sparse(GQA, moe=experts(shared=1)), "model.moe.num_shared_experts: 1, and mixtral has 0"),
        ("mixtral", sparse(GQA, NOT_NORMALIZED), "model.moe.router.normalize_topk: False, and mixtral has True"),
        ("mixtral", sparse(MLA), "model.attention.kind: mla, and mixtral has gqa"),
        ("mixtral", sparse(GQA, n_dense_layers=1), "model.n_dense_layers: 1, and mixtral has 0"),
        ("mixtral", sparse(GQA, mtp=MtpConfig(depth=1)), "model.mtp.depth: 1, and mixtral has 0"),
        ("olmoe", BIASED, "model.moe.balance.bias_update_rate: 0.1, and olmoe has 0.0"),
        ("deepseek_v3", deepseek(n_layers=4, dense_layers=[2]), "model.dense_layers: [2], and deepseek_v3 has []"),
        ("dbrx", sparse(replace(GQA, head_dim=12), **DBRX), "model.attention.head_dim: 12, and dbrx has 8"),
        ("dbrx", sparse(GQA, **DBRX), "model.attention.clip_qkv: null, and transformers runs no dbrx without it"),
        ("dbrx", sparse(GQA, **DBRX, tie_embeddings=True), "model.tie_embeddings: True, and dbrx has False"),
        ("gpt_oss", sparse(GQA), "model.swiglu.offset: 0.0, and gpt_oss has 1.0"),
        ("mixtral", sparse(replace(GQA, sinks=True)), "model.attention.sinks: True, and mixtral has False"),
        ("qwen3_moe", DEALT, "model.moe.router.assignment: uniform, and qwen3_moe has scores"),
    ],
)
def test_a_model_that_a_family_does_not_have_is_refused_with_the_reason(
    family: str, cfg: ModelConfig, reason: str
) -> None:
    reasons = FAMILIES[family].fits(cfg)
    assert any(text.startswith(reason) for text in reasons), reasons
    with pytest.raises(ConfigError, match=rf"model as {family}: "):
        FAMILIES[family].write_config(cfg, 64)


def test_what_only_training_reads_stands_in_no_way() -> None:
    cfg = deepseek(document_masking=True)
    cfg.moe.balance = BalanceConfig(0.0, z_loss_weight=0.0, bias_update_rate=0.001, bias_freeze_at="10ba")
    cfg.moe.capacity_factor, cfg.moe.router.input_jitter, cfg.mtp.loss_weight = 1.5, 0.1, 0.7
    assert FAMILIES["deepseek_v3"].fits(cfg) == []


@pytest.mark.parametrize(("family", "variant"), CASES, ids=["-".join(case) for case in CASES])
def test_a_family_is_found_for_every_model(family: str, variant: str) -> None:
    found = family_for(VARIANTS[family][variant])
    assert found.name == family or found.fits(VARIANTS[family][variant]) == []


def test_a_model_of_no_family_is_refused_with_all_reasons() -> None:
    with pytest.raises(UserError, match="no Hugging Face family computes what this model does") as error:
        family_for(load_recipe(QUICKSTART).model)
    assert all(f"\n  {name}: model." in str(error.value) for name in FAMILIES)
    assert "Ellipsis" not in str(error.value)
    assert "\n  llama: model.n_dense_layers: 1, and llama has 6;" in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_all_other_families_are_judged(family: str) -> None:
    """Whatever they have, the answer is a list of reasons, and no error."""
    for other in FAMILIES.values():
        cfg = other.read_config(other.published[1])
        more = replace(cfg.moe, num_shared_experts=cfg.moe.num_shared_experts + 1, shared_expert_gate=True)
        for changed in (cfg, replace(cfg, mtp=MtpConfig(depth=1)), replace(cfg, moe=more)):
            assert FAMILIES[family].fits(changed) or FAMILIES[family].write_config(changed, 64)
