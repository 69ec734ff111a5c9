"""Configs in the form of transformers 5, with what other tools add: the same models, and contradictions named."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import ConfigError, YarnConfig
from moefoundry.conversion.families import FAMILIES, family_of
from tests.conversion.families.models import OLDER_CASES, VARIANTS
from tests.conversion.hf import as_version_5

FAULTS = Path(os.environ.get("MOEFOUNDRY_FAULTS", "/nowhere")) / "transformers5"
UNSCALED = ("dbrx_clip", "dsv3_default", "mixtral_headdim", "olmoe_norm_clip", "qwen3moe_default")
SCALED = {"dsv3_yarn": YarnConfig(8.0, 32, 32.0, 1.0, 1.0, 0.8), "qwen3moe_yarn": YarnConfig(8.0, 32)}
TOOLS = {"unsloth_version": "2026.1", "tokenizer_class": "PreTrainedTokenizerFast", "id2label": {"0": "LABEL_0"}}


def config(family: str, variant: str = "plain") -> dict[str, Any]:
    written = FAMILIES[family].write_config(VARIANTS[family][variant], max_seq_len=64)
    return json.loads(json.dumps(as_version_5({"rope_scaling": None, **written})))


@pytest.mark.parametrize(("family", "variant"), OLDER_CASES, ids=["-".join(case) for case in OLDER_CASES])
def test_the_newer_form_is_the_same_model(family: str, variant: str) -> None:
    hf = config(family, variant) | TOOLS
    assert "rope_theta" not in hf
    assert family_of(hf).read_config(hf) == VARIANTS[family][variant]


@pytest.mark.parametrize("name", [*UNSCALED, *SCALED])
@pytest.mark.skipif(not FAULTS.is_dir(), reason="MOEFOUNDRY_FAULTS does not name a directory with transformers5/")
def test_files_that_it_has_saved(name: str) -> None:
    hf = json.loads((FAULTS / f"{name}.json").read_text())
    cfg = family_of(hf).read_config(hf)
    assert cfg.attention.rope_theta == hf["rope_parameters"]["rope_theta"]
    assert cfg.attention.yarn == SCALED.get(name)
    experts = {"dsv3_default": 16, "dsv3_yarn": 16}
    assert cfg.moe.num_experts == experts.get(name, 8)
    assert cfg.mtp.depth == hf.get("num_nextn_predict_layers", 0)
    assert family_of(hf).read_config(family_of(hf).write_config(cfg, 256)) == cfg


def test_both_forms_at_once_are_read_where_they_agree() -> None:
    old = FAMILIES["deepseek_v3"].write_config(VARIANTS["deepseek_v3"]["yarn"], max_seq_len=64)
    both = config("deepseek_v3", "yarn") | {key: old[key] for key in ("rope_theta", "rope_scaling", "torch_dtype")}
    both |= {"num_local_experts": old["n_routed_experts"]}
    assert FAMILIES["deepseek_v3"].read_config(both) == VARIANTS["deepseek_v3"]["yarn"]


@pytest.mark.parametrize(
    ("family", "variant", "changes", "culprit"),
    [
        (
            "llama",
            "plain",
            {"rope_theta": 1e4},
            "rope_theta: got 10000.0; allowed: 500000.0, as rope_parameters",
        ),
        ("llama", "yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: got {"),
        ("llama", "plain", {"rope_parameters": [1]}, "rope_parameters: got [1]; allowed: a mapping"),
        (
            "llama",
            "plain",
            {"rope_parameters.partial_rotary_factor": 0.5},
            "partial_rotary_factor: got 0.5",
        ),
        ("llama", "plain", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5; allowed: 1.0"),
        ("llama", "plain", {"rope_parameters.rope_type": "dynamic"}, 'rope_parameters.rope_type: got "dynamic"'),
        (
            "llama",
            "plain",
            {"rope_parameters.low_freq_factor": 1.0},
            "rope_parameters.low_freq_factor: got 1.0",
        ),
        ("llama", "yarn", {"rope_parameters.truncate": 0}, "rope_parameters.truncate: got 0; allowed: true or false"),
        ("llama", "yarn", {"rope_parameters.factor": None}, "rope_parameters.factor: missing"),
        ("qwen3_moe", "plain", {"num_experts": 9}, "num_local_experts: got 8; allowed: 9, as num_experts says"),
        ("qwen3_moe", "window", {"max_window_layers": 2}, "max_window_layers: got 2; allowed: 0"),
        (
            "dbrx",
            "plain",
            {"attn_config.rope_theta": 1e6},
            "attn_config.rope_theta: got 1000000.0; allowed: 1",
        ),
        ("dbrx", "plain", {"rope_theta": 1e6}, "rope_theta: got 1000000.0; allowed: 10000.0"),
        ("dbrx", "plain", {"ffn_config.hidden_size": 7}, "ffn_config.hidden_size: got 7; allowed: 32"),
        (
            "dbrx",
            "plain",
            {"attn_config.is_encoder_decoder": True},
            "attn_config.is_encoder_decoder: got true",
        ),
        (
            "dbrx",
            "plain",
            {"rope_parameters.rope_type": "yarn", "rope_parameters.factor": 2.0},
            "allowed: no extension",
        ),
    ],
)
def test_what_contradicts_itself_or_is_another_model_is_named(
    family: str, variant: str, changes: dict[str, Any], culprit: str
) -> None:
    hf = config(family, variant)
    for key, value in changes.items():
        parent, _, leaf = key.rpartition(".")
        (hf[parent] if parent else hf)[leaf] = value
    with pytest.raises(ConfigError) as raised:
        FAMILIES[family].read_config(hf)
    assert culprit in str(raised.value)


def test_a_window_of_qwen_is_in_every_layer_there() -> None:
    """Where transformers 4 has none below ``max_window_layers``, 28 by default, which version 5 has not."""
    hf = config("qwen3_moe", "window")
    assert "max_window_layers" not in hf
    assert FAMILIES["qwen3_moe"].read_config(hf).attention.sliding_window == 5  # type: ignore[union-attr]
    assert FAMILIES["qwen3_moe"].read_config(hf | {"use_sliding_window": False}).attention.sliding_window is None  # type: ignore[union-attr]


def test_a_window_that_is_not_used_may_be_anything() -> None:
    hf = config("qwen3") | {"sliding_window": 0, "use_sliding_window": False}
    assert FAMILIES["qwen3"].read_config(hf) == VARIANTS["qwen3"]["plain"]


def test_theta_of_dbrx_is_written_where_either_version_reads_it() -> None:
    written = FAMILIES["dbrx"].write_config(VARIANTS["dbrx"]["clipped"], 64)
    assert written["rope_theta"] == written["attn_config"]["rope_theta"] == 5e5


def test_a_factor_that_no_two_lengths_give_is_not_written() -> None:
    """Transformers 4 would take the nearest that they give, and version 5 the factor."""
    cfg = VARIANTS["llama"]["yarn"]
    cfg = replace(cfg, attention=replace(cfg.attention, yarn=YarnConfig(factor=3.3, original_max_seq_len=32)))
    (reason,) = FAMILIES["llama"].fits(cfg)
    assert reason.startswith("model.attention.yarn.factor: 3.3, and transformers takes the ratio of two whole lengths")
