"""Qwen3-Next and Qwen3.5-MoE: projections by heads, prediction modules that no config declares, a vision tower."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moefoundry.config import ConfigError, LinearAttentionConfig, ModelConfig, MtpConfig
from moefoundry.conversion.convert import export_hf, import_hf, load_hf
from moefoundry.conversion.families import FAMILIES, family_of
from moefoundry.conversion.hf_directory import open_hf
from moefoundry.model.transformer import MoETransformer
from tests.conversion.families.models import VARIANTS, assert_covered_once, hybrid, our_tensors
from tests.conversion.families.published import PUBLISHED
from tests.conversion.hf import assert_same_tensors, change_config, contents, family_tensors, fused, write_hf
from tests.conversion.oracle import needs_oracle

NEXT, TEXT = "qwen3_next", "qwen3_5_moe_text"
families = pytest.mark.parametrize("family", [NEXT, TEXT])


def with_mtp(family: str) -> ModelConfig:
    return replace(VARIANTS[family]["plain"], mtp=MtpConfig(depth=1))


def write_multimodal(directory: Path, cfg: ModelConfig, experts_fused: bool = True) -> Path:
    """As Qwen3.5 is published: the language model below ``model.language_model``, beside a vision tower."""
    write_hf(directory, TEXT, cfg)
    text = json.loads((directory / "config.json").read_text())
    tensors = fused(contents(directory)) if experts_fused else contents(directory)
    renamed = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }
    tower = {"model.visual.blocks.0.attn.qkv.weight": torch.ones(6, 2), "model.visual.patch_embed.bias": torch.ones(2)}
    save_file(renamed | tower, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": cfg.tie_embeddings,
        **{"image_token_id": 1, "vision_config": {"depth": 1}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_projections_of_a_head_of_keys_lie_together() -> None:
    """By hand: 2 heads of keys, 10 wide; 6 of values, 16 wide: 3 to a head of keys; so 116 rows to each."""
    pieces = [piece for piece in FAMILIES[NEXT].pieces(VARIANTS[NEXT]["plain"]) if ".0.attention." in piece.name]
    rows = {
        (piece.name.split(".")[3], piece.our_rows): piece.rows
        for piece in pieces
        if piece.hf_name.endswith("qkvz.weight")
    }
    assert rows == {
        ("qkv_proj", (0, 10)): (0, 10),
        ("qkv_proj", (20, 30)): (10, 20),
        ("qkv_proj", (40, 88)): (20, 68),
        ("gate_proj", (0, 48)): (68, 116),
        ("qkv_proj", (10, 20)): (116, 126),
        ("qkv_proj", (30, 40)): (126, 136),
        ("qkv_proj", (88, 136)): (136, 184),
        ("gate_proj", (48, 96)): (184, 232),
    }
    narrow = [(p.name.split(".")[3], p.our_rows, p.rows) for p in pieces if p.hf_name.endswith("in_proj_ba.weight")]
    assert narrow == [
        ("beta_proj", (0, 3), (0, 3)),
        ("decay_proj", (0, 3), (3, 6)),
        ("beta_proj", (3, 6), (6, 9)),
        ("decay_proj", (3, 6), (9, 12)),
    ]


@families
def test_a_prediction_module_is_read_and_written_whatever_the_config_says(family: str, tmp_path: Path) -> None:
    cfg = with_mtp(family)
    tensors = family_tensors(family, cfg)
    assert_covered_once(list(FAMILIES[family].pieces(cfg)), our_tensors(MoETransformer(cfg)), tensors)
    assert {name.removeprefix("mtp.") for name in tensors if name.startswith("mtp.") and "layers" not in name} == {
        *("fc.weight", "norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"),
    }
    assert "mtp.layers.0.self_attn.q_proj.weight" in tensors
    hf = change_config(write_hf(tmp_path / "hf", family, cfg), **{FAMILIES[family].mtp_key: None})
    source = open_hf(hf)
    assert source.cfg == cfg
    assert source.notes == (
        "config.json declares 0 module(s) of multi-token prediction and the files hold 1: read with mtp.depth 1",
    )
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", family)
    assert_same_tensors(tmp_path / "exported", hf)
    assert open_hf(tmp_path / "exported").notes == ()


@families
def test_more_prediction_modules_share_weights_there_and_are_refused(family: str) -> None:
    reasons = FAMILIES[family].fits(replace(with_mtp(family), mtp=MtpConfig(depth=2)))
    assert reasons == [f"model.mtp.depth: 2, and {family} has 1"]


@pytest.mark.parametrize("experts_fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_language_model_of_a_published_directory(tmp_path: Path, experts_fused: bool, dtype: torch.dtype) -> None:
    cfg = with_mtp(TEXT)
    alone = write_hf(tmp_path / "alone", TEXT, cfg, dtype)
    hf = write_multimodal(tmp_path / "published", cfg, experts_fused)
    if dtype != torch.float32:
        tensors = {name: tensor.to(dtype) for name, tensor in contents(hf).items()}
        save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    source = open_hf(hf)
    assert (source.cfg, source.family.name, source.max_seq_len) == (cfg, TEXT, 64)
    assert source.notes == ("the vision tower is left out: 2 tensors model.visual.* are not read",)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", TEXT)
    assert_same_tensors(tmp_path / "exported", alone)
    with pytest.warns(UserWarning, match="vision tower"):
        assert_same_weights(load_hf(hf), load_hf(alone))


def assert_same_weights(ours: MoETransformer, theirs: MoETransformer) -> None:
    tensors: dict[str, Tensor] = theirs.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.slow
@needs_oracle
def test_a_published_directory_is_verified_by_the_newer_transformers(tmp_path: Path) -> None:
    hf = write_multimodal(tmp_path / "published", with_mtp(TEXT))
    parity = import_hf(hf, tmp_path / "checkpoint", tolerance=1e-3).parity
    assert parity is not None
    assert parity.transformers.startswith("5.")
    assert max(parity.logits, *parity.hidden) < 1e-3, "a recurrence amplifies roundings: 2e-4 on an AMD EPYC"


def test_the_shortest_form_of_the_blocks_kinds_is_read() -> None:
    config = FAMILIES[NEXT].write_config(VARIANTS[NEXT]["plain"], 64)
    read = FAMILIES[NEXT].read_config

    def linear(**changes: Any) -> LinearAttentionConfig | None:
        return read({key: value for key, value in (config | changes).items() if value is not None}).linear_attention

    full, other = "full_attention", "linear_attention"
    assert (config["layer_types"], config["full_attention_interval"]) == ([other, full, other], 2)
    by_list = linear(full_attention_interval=None)
    assert by_list == VARIANTS[NEXT]["plain"].linear_attention
    by_interval = linear(layer_types=None, full_attention_interval=3)
    assert by_interval is not None
    assert (by_interval.full_attention_interval, by_interval.layers) == (3, None)
    odd = linear(layer_types=[full, full, other], full_attention_interval=None)
    assert odd is not None
    assert odd.layers == [2]
    assert linear(layer_types=[full] * 3, full_attention_interval=None) is None


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"layer_types": ["full_attention"] * 2}, "layer_types: got"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types: got"),
        (
            {"linear_num_value_heads": 5},
            "linear_num_value_heads: got 5; allowed: a multiple of linear_num_key_heads, 2",
        ),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: got 2; allowed: 0 or 1"),
        ({"use_sliding_window": True}, "use_sliding_window: got true; allowed: false"),
        ({"attn_output_gate": False}, "attn_output_gate: got false; allowed: true"),
    ],
)
def test_what_is_another_model_is_named(changes: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILIES[NEXT].read_config(FAMILIES[NEXT].write_config(VARIANTS[NEXT]["plain"], 64) | changes)
    assert culprit in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"text_config": 3}, "text_config: got 3; allowed: a mapping"),
        ({"tie_word_embeddings": True}, "text_config.tie_word_embeddings: got False; allowed: True, as tie_word_embe"),
        ({"norm_topk_prob": False}, "norm_topk_prob: got false; allowed: true"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings: got true; allowed: false"),
        ({"audio_config": {}}, "audio_config: got {}, and this key is not known here"),
    ],
)
def test_what_contradicts_a_published_config_is_named(changes: dict[str, Any], culprit: str) -> None:
    published = PUBLISHED["qwen3.5-35b-a3b"]
    published = published | {"text_config": published["text_config"] | {"tie_word_embeddings": False}}
    with pytest.raises(ConfigError) as caught:
        family_of(published).read_config(published | changes)
    assert culprit in str(caught.value)


def test_models_without_its_parts_are_not_exported_as_it() -> None:
    cfg = hybrid(VARIANTS["qwen3_moe"]["plain"].attention)
    assert "model.attention.output_gate: False, and qwen3_next has True" in FAMILIES[NEXT].fits(cfg)
    reasons = FAMILIES["qwen3_moe"].fits(VARIANTS[NEXT]["plain"])
    assert any(reason.startswith("model.linear_attention.n_key_heads: 2, and qwen3_moe has None") for reason in reasons)
    assert "model.norm.zero_centered: True, and qwen3_moe has False" in reasons
