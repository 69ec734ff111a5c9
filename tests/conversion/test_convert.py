"""Conversion from and to Hugging Face directories: lossless, complete or refused, and in little memory."""

import hashlib
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import moefoundry
from moefoundry.checkpoint.manifest import STATE_KEYS, WEIGHTS_ONLY, read_state
from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.checkpoint.save import write
from moefoundry.checkpoint.weights import read_model_config
from moefoundry.cli.main import main
from moefoundry.config import ModelConfig, Recipe, UserError, flatten, load_recipe
from moefoundry.conversion.convert import (
    PREFIX,
    consolidate,
    export_hf,
    import_hf,
    load_model,
)
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.parity import verify_outputs
from moefoundry.conversion.safetensors_io import write_safetensors
from moefoundry.conversion.starting_recipe import Size, peak_rate, with_balance
from moefoundry.conversion.tensor_map import Dtype
from moefoundry.data.tokenizer_files import special_token_ids
from moefoundry.model.transformer import MoETransformer
from moefoundry.verify.round_trip import random_model, save
from tests.checkpoint.forge import recommit
from tests.conversion.families.models import VOCAB
from tests.conversion.hf import (
    assert_same_tensors,
    change_config,
    contents,
    family_config,
    family_tensors,
    from_fp8,
    to_fp8,
    to_int4,
    write_hf,
    write_tokenizer,
)
from tests.distributed import run_distributed
from tests.model.tiny import meta_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

MIXTRAL = family_config("mixtral")
DEEPSEEK = family_config("deepseek_v3", mtp_depth=1)
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True}}},
}


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    ("family", "variant"),
    [(family, "plain") for family in FAMILIES]
    + [("mixtral", "tied"), ("deepseek_v3", "moonlight"), ("deepseek_v3", "no_shared"), ("qwen3_moe", "dense_between")],
)
def test_import_and_export_give_back_every_bit(tmp_path: Path, family: str, variant: str) -> None:
    cfg = family_config(family, variant, mtp_depth=2 if family == "deepseek_v3" and variant != "moonlight" else 0)
    hf = write_hf(tmp_path / "hf", family, cfg, torch.bfloat16)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", family)
    assert_same_tensors(tmp_path / "back", hf)
    assert FAMILIES[family].read_config(read_json(tmp_path / "back")) == FAMILIES[family].read_config(read_json(hf))
    assert read_json(tmp_path / "back") == read_json(hf)


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe_lite", "bailing_moe"])
def test_the_family_that_fits_is_found(tmp_path: Path, family: str) -> None:
    cfg = family_config(family)
    hf = write_hf(tmp_path / "hf", family, cfg)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    found = FAMILIES[read_json(tmp_path / "back")["model_type"]]
    assert found.fits(cfg) == []


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", MIXTRAL)
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert_same_tensors(tmp_path / "shards", hf)
    import_hf(tmp_path / "shards", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", hf)


def test_large_tensors_go_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefoundry.checkpoint.out_of_core.SHARD_BYTES", 2000)
    for family in ("mixtral", "dbrx"):
        hf = write_hf(tmp_path / family, family, family_config(family))
        import_hf(hf, tmp_path / f"{family}-checkpoint")
        export_hf(tmp_path / f"{family}-checkpoint", tmp_path / f"{family}-back")
        assert_same_tensors(tmp_path / f"{family}-back", hf)


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_dtypes(tmp_path: Path, stored: str) -> None:
    """Of parameters; the bias that only the choice of experts sees stays as it is."""
    hf = write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK, torch.float16)
    import_hf(hf, tmp_path / "checkpoint", Dtype(stored))
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[stored]
    read, source = contents(tmp_path / "back"), contents(hf)
    for name, tensor in read.items():
        expected = source[name] if name.endswith("correction_bias") else source[name].to(dtype)
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name
    assert read_json(tmp_path / "back")["torch_dtype"] == str(dtype).removeprefix("torch.")
    export_hf(tmp_path / "checkpoint", tmp_path / "half", dtype=Dtype.bf16)
    assert contents(tmp_path / "half")["lm_head.weight"].dtype == torch.bfloat16


def test_verifying_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers has no multi-token prediction, and warns of its tensors."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    hf = write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK)
    import_hf(hf, tmp_path / "checkpoint", tolerance=1e-4)
    assert caplog.text == ""
    AutoModelForCausalLM.from_pretrained(hf)
    assert "were not used" in caplog.text, "the silence has ended, and there was something to silence"


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_transformers_loads_what_is_exported(tmp_path: Path, family: str) -> None:
    hf = write_hf(tmp_path / "hf", family, family_config(family))
    write_tokenizer(tmp_path / "tokenizer")
    summary = import_hf(hf, tmp_path / "checkpoint", tolerance=1e-4)
    assert summary.parity is not None
    assert summary.has_tokenizer is False
    summary = export_hf(tmp_path / "checkpoint", tmp_path / "back", tokenizer=tmp_path / "tokenizer", tolerance=1e-4)
    assert re.fullmatch(
        rf"{tmp_path}/back: \d+ tensors, 0\.00 GiB; verified, logits differ by at most .*", str(summary)
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ours = load_model(tmp_path / "checkpoint")
    torch.testing.assert_close(ours(ids()), theirs(ids()).logits, rtol=0, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "def first(value):\n    return value"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    assert tokenizer.eos_token_id == 0
    assert theirs.config.to_dict().items() >= special.items()
    assert GenerationConfig.from_pretrained(tmp_path / "back").to_dict().items() >= special.items()


@pytest.mark.parametrize("fits", [True, False], ids=["whole", "by_block"])
def test_a_model_that_was_trained_with_document_masking_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr("moefoundry.conversion.convert.fits_twice", lambda _: fits)
    model = random_model(replace(family_config("mixtral"), document_masking=True))
    save(model, tmp_path / "checkpoint", 64)
    summary = export_hf(tmp_path / "checkpoint", tmp_path / "hf", tolerance=1e-4)
    assert summary.parity is not None
    assert summary.parity.by_block is not fits


def test_a_model_without_compressed_queries_is_verified(tmp_path: Path) -> None:
    """Which transformers 4.51 does not build by itself."""
    hf = write_hf(tmp_path / "hf", "deepseek_v3", family_config("deepseek_v3", "moonlight"))
    import_hf(hf, tmp_path / "checkpoint", tolerance=1e-4)
    export_hf(tmp_path / "checkpoint", tmp_path / "back", tolerance=1e-4)
    zeros = torch.zeros_like(contents(hf)["model.layers.0.self_attn.q_proj.weight"])
    wrong = write_hf(tmp_path / "wrong", "deepseek_v3", family_config("deepseek_v3", "moonlight"))
    save_file(contents(wrong) | {"model.layers.0.self_attn.q_proj.weight": zeros}, wrong / "model.safetensors")
    with pytest.raises(UserError, match="logits differ by"):
        verify_outputs(wrong, load_model(tmp_path / "checkpoint"), 1e-4)


def test_what_transformers_does_not_load_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", MIXTRAL)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("size mismatch\n\tfor lm_head")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot be verified: .* load it: size mismatch for lm_head$"):
        import_hf(hf, tmp_path / "checkpoint", tolerance=1e-4)


def test_the_recipe_of_an_import_is_for_every_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", "mixtral", MIXTRAL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    import_hf(Path("hf"), Path("./models/../imported"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(Path("../imported/recipe.yaml"))
    assert recipe.load_path == str(tmp_path / "imported")
    odd = replace(MIXTRAL, moe=replace(MIXTRAL.moe, backend="loop"))
    assert recipe.model == with_balance(FAMILIES["mixtral"], odd, {})
    assert (recipe.run_name, recipe.max_duration, recipe.precision.compute) == ("imported", "1ep", "bf16")
    assert recipe.optimizer.lr == pytest.approx(peak_rate(Size.of(MIXTRAL).active) / 10, rel=0.1)


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", MIXTRAL)
    for file in write_tokenizer(tmp_path / "tokenizer").iterdir():
        file.rename(hf / file.name)
    (hf / "generation_config.json").write_text('{"eos_token_id": [0, 1], "temperature": 0.6}')
    assert import_hf(hf, tmp_path / "checkpoint").has_tokenizer
    assert export_hf(tmp_path / "checkpoint", tmp_path / "back").has_tokenizer
    for file in hf.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    assert read_json(tmp_path / "back")["eos_token_id"] == [0, 1]
    assert special_token_ids(tmp_path / "tokenizer") == {}, "nothing is left there"


def test_special_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "tokenizer")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"bos_token": None, "pad_token": {"content": "<fim_hole>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_token_ids(directory) == {"eos_token_id": 0, "pad_token_id": 3}


# ------------------------------------------------------------------------------------------------------------ DeepSeek


def fp8_tensors(cfg: ModelConfig, skip: str = "") -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """DeepSeek's way: the weights of layers in FP8, embedding, head, gates and norms not. And what they stand for."""
    published, expected = {}, {}
    for name, tensor in family_tensors("deepseek_v3", cfg, torch.bfloat16).items():
        published[name] = expected[name] = tensor
        if tensor.dim() == 2 and "layers" in name and not re.search("gate.weight|embed_tokens|head|eh_proj", name):
            published[name], published[f"{name}_scale_inv"] = to_fp8(tensor)
            expected[name] = from_fp8(published[name], published[f"{name}_scale_inv"])
    return published, expected


def wide_deepseek() -> ModelConfig:
    """Sizes above 128 that are no multiple of it."""
    cfg = replace(DEEPSEEK, d_model=144, ffn_hidden_size=272)
    return replace(cfg, moe=replace(cfg.moe, expert_hidden_size=136))


@pytest.mark.parametrize("dtype", [Dtype.keep, Dtype.fp32])
def test_published_fp8_weights_are_imported(tmp_path: Path, dtype: Dtype) -> None:
    cfg = wide_deepseek()
    hf = write_hf(tmp_path / "hf", "deepseek_v3", cfg, torch.bfloat16)
    published, expected = fp8_tensors(cfg)
    assert len(published) > len(expected) + 20
    save_file(published, hf / "model.safetensors")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (hf / "config.json").write_text(json.dumps(read_json(hf) | {"quantization_config": quantization}))
    summary = import_hf(hf, tmp_path / "checkpoint", dtype, tolerance=1e-3)
    assert summary.parity is not None
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    read = contents(tmp_path / "back")
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor if name.endswith("correction_bias") else tensor.to(dtype.torch or torch.bfloat16)
        assert torch.equal(read[name], wanted), name
    assert "quantization_config" not in read_json(tmp_path / "back")


def test_published_int4_weights_are_imported(tmp_path: Path) -> None:
    """Kimi's way: the experts' weights in groups of 4 columns, and no others."""
    hf = write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK, torch.bfloat16)
    published, expected = {}, {}
    for name, tensor in contents(hf).items():
        if ".experts." not in name:
            published[name] = expected[name] = tensor
            continue
        parts, expected[name] = to_int4(tensor, 4)
        published |= {f"{name}{end}": part for end, part in parts.items()}
    save_file(published, hf / "model.safetensors")
    change_config(hf, model_type="kimi_k2", quantization_config=INT4)
    assert import_hf(hf, tmp_path / "checkpoint", tolerance=1e-3).parity is not None
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    read = contents(tmp_path / "back")
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor if name.endswith("correction_bias") else tensor.bfloat16()), name


def test_the_prediction_module_is_imported(tmp_path: Path) -> None:
    """Transformers passes it over."""
    hf = write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK)
    import_hf(hf, tmp_path / "checkpoint")
    stored, source = StoredTensors(tmp_path / "checkpoint", PREFIX), contents(hf)
    layer = f"model.layers.{DEEPSEEK.n_layers}"
    assert torch.equal(stored.read("mtp.0.proj.weight"), source[f"{layer}.eh_proj.weight"])
    assert torch.equal(
        stored.read("mtp.0.block.ffn.experts.up_proj", (5, 6))[0], source[f"{layer}.mlp.experts.5.up_proj.weight"]
    )


def test_copies_may_be_left_out_and_must_be_equal(tmp_path: Path) -> None:
    layer = f"model.layers.{DEEPSEEK.n_layers}"
    without = {f"{layer}.embed_tokens.weight": None, f"{layer}.shared_head.head.weight": None}
    whole = write_hf(tmp_path / "whole", "deepseek_v3", DEEPSEEK)
    import_hf(write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK, **without), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", whole)
    changed = {f"{layer}.embed_tokens.weight": contents(whole)["model.embed_tokens.weight"] + 1}
    with pytest.raises(UserError, match=rf"{layer}\.embed_tokens\.weight differs from model\.embed_tokens\.weight"):
        import_hf(write_hf(tmp_path / "changed", "deepseek_v3", DEEPSEEK, **changed), tmp_path / "other")


def test_a_tied_head_may_be_stored(tmp_path: Path) -> None:
    cfg = family_config("llama", "tied")
    embedding = family_tensors("llama", cfg)["model.embed_tokens.weight"]
    stored = write_hf(tmp_path / "stored", "llama", cfg, **{"lm_head.weight": embedding.clone()})
    import_hf(stored, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", write_hf(tmp_path / "left_out", "llama", cfg))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        import_hf(write_hf(tmp_path / "other", "llama", cfg, **{"lm_head.weight": embedding + 1}), tmp_path / "x")


# -------------------------------------------------------------------------------------------------------------- refused


def test_wrong_tensors_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    expert = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    changed = {
        expert.format(3): None,
        "model.norm.weight": None,
        expert.format(5): torch.zeros(20, 32),
        "model.extra.weight": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),  # older transformers stored this constant
    }
    hf = write_hf(tmp_path / "hf", "mixtral", MIXTRAL, **changed)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as raised:
        import_hf(hf, tmp_path / "checkpoint")
    assert str(raised.value).splitlines() == [
        f"{hf} does not hold the tensors of its model:",
        f"  {expert.format(3)}: missing",
        "  model.norm.weight: missing",
        f"  {expert.format(5)}: has shape (20, 32), not (32, 20)",
        "  model.extra.weight: not expected",
    ]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_lacks_a_tensor_is_not_exported(tmp_path: Path) -> None:
    import_hf(write_hf(tmp_path / "hf", "mixtral", MIXTRAL), tmp_path / "whole")
    stored = StoredTensors(tmp_path / "whole")
    tensors = {name: stored.read(name) for name in stored.specs if "norm" not in name}
    (tmp_path / "part").mkdir()
    write(tmp_path / "part", tensors, read_state(tmp_path / "whole"))
    for convert in (export_hf, consolidate):
        with pytest.raises(UserError, match=r"layers\.1\.ffn_norm\.weight: missing\n  \.\.\. and 1 more missing$"):
            convert(tmp_path / "part", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "part", "whole"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", MIXTRAL)
    import_hf(hf, tmp_path / "checkpoint")
    for convert in (
        lambda: import_hf(hf, tmp_path / "checkpoint"),
        lambda: export_hf(tmp_path / "checkpoint", hf),
        lambda: consolidate(tmp_path / "checkpoint", hf / "model.safetensors"),
    ):
        with pytest.raises(UserError, match="exists already; nothing is overwritten"):
            convert()


def test_what_a_family_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    import_hf(write_hf(tmp_path / "hf", "qwen3_moe", family_config("qwen3_moe")), tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"model\.attention\.qk_norm: head, and mixtral has none"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", "mixtral")
    with pytest.raises(UserError, match="no model family 'gpt2'; there are afmoe, bailing_moe, dbrx, "):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", "gpt2")
    assert not (tmp_path / "out").exists()


def test_a_run_whose_tokenizer_is_gone_needs_another(tmp_path: Path) -> None:
    import_hf(write_hf(tmp_path / "hf", "mixtral", MIXTRAL), tmp_path / "checkpoint")
    state = tmp_path / "checkpoint" / "state.json"
    state.write_text(state.read_text().replace('"recipe": {', '"recipe": {"tokenizer.name": "gone",'))
    recommit(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="no tokenizer at gone; name its directory: tokenizer=\\.\\.\\."):
        export_hf(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(UserError, match=f"no tokenizer at {tmp_path}; name"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", tokenizer=tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    assert export_hf(tmp_path / "checkpoint", tmp_path / "out", tokenizer=tmp_path / "tokenizer").has_tokenizer


@pytest.mark.parametrize("side", ["import", "export"])
def test_verification_finds_a_wrong_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", MIXTRAL)
    import_hf(hf, tmp_path / "checkpoint")
    pieces = FAMILIES["mixtral"].pieces
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def swapped(cfg: ModelConfig) -> Any:
        for piece in pieces(cfg):
            parent, _, projection = piece.name.rpartition(".")
            yield replace(piece, name=f"{parent}.{swap.get(projection, projection)}")

    monkeypatch.setattr(FAMILIES["mixtral"], "pieces", swapped)
    convert, source = (import_hf, hf) if side == "import" else (export_hf, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"logits differ by .*, more than 1\.0e-03"):
        convert(source, tmp_path / "out", tolerance=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"], "nothing unverified is left"


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("mixtral", "tied"),
        ("qwen3_moe", "dense_between"),
        ("deepseek_v3", "moonlight"),
        ("deepseek_v3", "yarn"),
        ("granitemoe", "plain"),
        ("qwen2_moe", "no_shared"),
        ("olmo2", "biased"),
        ("dbrx", "plain"),
    ],
)
def test_a_model_too_large_for_two_copies_is_verified_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, variant: str
) -> None:
    monkeypatch.setattr("moefoundry.conversion.convert.fits_twice", lambda _: False)
    monkeypatch.setattr("moefoundry.conversion.convert.load_model", lambda *_, **__: pytest.fail("whole in memory"))
    cfg = family_config(family, variant)
    hf = write_hf(tmp_path / "hf", family, cfg, torch.bfloat16)
    for summary in (
        import_hf(hf, tmp_path / "checkpoint", Dtype.fp32, tolerance=1e-4),
        export_hf(tmp_path / "checkpoint", tmp_path / "back", family, tolerance=1e-4),
    ):
        assert summary.parity is not None
        assert "verified block by block, logits differ by at most" in str(summary)
        assert len(summary.parity.hidden) == cfg.n_layers
        assert max(summary.parity.hidden) < 1e-4


def test_verification_block_by_block_names_the_first_wrong_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefoundry.conversion.convert.fits_twice", lambda _: False)
    hf = write_hf(tmp_path / "hf", "qwen3_moe", family_config("qwen3_moe", "dense_between"))
    import_hf(hf, tmp_path / "checkpoint")
    pieces = FAMILIES["qwen3_moe"].pieces

    def swapped(cfg: ModelConfig) -> Any:
        for piece in pieces(cfg):
            norms = {f"layers.3.{name}_norm.weight": name for name in ("attention", "ffn")}
            other = {"attention": "ffn", "ffn": "attention"}.get(norms.get(piece.name, ""), "")
            yield replace(piece, name=f"layers.3.{other}_norm.weight") if other else piece

    monkeypatch.setattr(FAMILIES["qwen3_moe"], "pieces", swapped)
    with pytest.raises(UserError, match=r"logits differ by .*; hidden states from block 3 on \("):
        export_hf(tmp_path / "checkpoint", tmp_path / "out", "qwen3_moe", tolerance=1e-3)


def test_what_went_in_and_what_came_out_have_the_same_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK, torch.bfloat16)
    came_in = import_hf(hf, tmp_path / "checkpoint", tolerance=1e-3)
    assert came_in.checksums is not None
    assert came_in.checksums.values.keys() == contents(hf).keys()
    gate = "model.layers.1.mlp.experts.3.gate_proj.weight"
    expected = hashlib.sha256(contents(hf)[gate].view(torch.uint8).numpy().tobytes()).hexdigest()
    assert came_in.checksums.values[gate] == expected
    went_out = export_hf(tmp_path / "checkpoint", tmp_path / "back", "deepseek_v3", tolerance=1e-3)
    assert went_out.checksums is not None
    assert went_out.checksums.values["layers.1.ffn.experts.gate_proj[3]"] == expected
    assert "72 of experts and 3 of biases among them" in str(came_in)

    def damaged(directory: Path, *arguments: Any) -> None:
        write_safetensors(directory, *arguments)
        tensors = contents(directory)
        tensors[gate] = tensors[gate].roll(1, dims=0)
        save_file(tensors, directory / "model.safetensors")

    monkeypatch.setattr("moefoundry.conversion.convert.write_safetensors", damaged)
    message = r"tensors that are not what went in:\n  layers\.1\.ffn\.experts\.gate_proj\[3\]$"
    with pytest.raises(UserError, match=message):
        export_hf(tmp_path / "checkpoint", tmp_path / "damaged", "deepseek_v3", tolerance=1e9)
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            r"FP8 weights in blocks, MXFP4, and INT4 weights .* can be read, not .*gptq",
        ),
        ({"quant_method": "fp8"}, 'can be read, not quantization_config {"quant_method": "fp8"}'),
        (INT4 | {"format": "nvfp4-pack-quantized"}, "can be read, not quantization_config"),
        (INT4 | {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, "can be read, not quantization_config"),
    ],
)
def test_other_quantized_weights_are_refused(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", MIXTRAL)
    (hf / "config.json").write_text(json.dumps(read_json(hf) | {"quantization_config": quantization}))
    with pytest.raises(UserError, match=message):
        import_hf(hf, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen9_moe"}, "model_type 'qwen9_moe' is not among the families: llama, qwen2, "),
        ({"new_option": 3}, "new_option: got 3, and this key is not known here"),
        ({"hidden_act": "gelu"}, 'hidden_act: got "gelu"; allowed: "silu"'),
        (
            {"quantization_config": {"quant_method": "awq"}},
            'can be read, not quantization_config {"quant_method": "awq"}',
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            'rope_scaling.rope_type: got "linear"; allowed: yarn, llama3, default',
        ),
    ],
)
def test_what_is_not_supported_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    hf = change_config(write_hf(tmp_path / "hf", "mixtral", MIXTRAL), **changes)
    assert main(["convert", "import", str(hf), "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == (1 if lines[0].find(message) > 0 else 2)
    assert message in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "config.json"))):
        import_hf(tmp_path, tmp_path / "out")


# -------------------------------------------------------------------------------------------------- our own checkpoints


def save_trained(recipe: Recipe) -> None:
    from moefoundry.trainer import train

    train(recipe)


def save_on_mesh(directory: Path, cfg: ModelConfig, degrees: tuple[int, int, int] | None) -> None:
    """A checkpoint of the initial weights of seed 0, as a run on this mesh saves it."""
    from moefoundry.checkpoint.state import trained_tensors
    from moefoundry.config import MeshConfig, PrecisionConfig
    from moefoundry.foundry import ComposerMoECausalLM
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.parallel import materialize, parallelize

    model = meta_model(cfg)
    meshes = degrees and build_meshes(resolve_degrees(MeshConfig(*degrees), degrees[0] * degrees[1]), "cpu")
    parallelize(model, meshes, PrecisionConfig())
    materialize(model, "cpu", 0)
    recipe = {key: value for key, value in flatten(Recipe(model=cfg)).items() if key.startswith("model.")}
    write(directory, trained_tensors(ComposerMoECausalLM(model)), dict.fromkeys(STATE_KEYS, 0) | {"recipe": recipe})


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_exports_of_any_mesh_are_the_same(tmp_path: Path, family: str) -> None:
    cfg = family_config(family)
    for name, ranks, degrees in (("mesh", 4, (1, 4, 2)), ("single", 1, None)):
        (tmp_path / name).mkdir()
        run_distributed(save_on_mesh, ranks, tmp_path / name, cfg, degrees)
        export_hf(tmp_path / name, tmp_path / f"{name}-hf", family)
    for file in (tmp_path / "single-hf").iterdir():
        assert (tmp_path / "mesh-hf" / file.name).read_bytes() == file.read_bytes(), file.name
    assert contents(tmp_path / "mesh-hf")["lm_head.weight"].std() > 0.1


def test_consolidated_weights_are_the_models(tmp_path: Path) -> None:
    import_hf(write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK), tmp_path / "checkpoint")
    consolidate(tmp_path / "checkpoint", tmp_path / "weights.safetensors")
    consolidate(tmp_path / "checkpoint", tmp_path / "shards", max_shard_bytes=30_000)
    model = MoETransformer(DEEPSEEK)
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    torch.testing.assert_close(model.eval()(ids()), load_model(tmp_path / "checkpoint")(ids()))
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for name, tensor in contents(tmp_path / "shards").items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(UserError, match="exceed one shard; name a directory, or allow a larger shard"):
        consolidate(tmp_path / "checkpoint", tmp_path / "other.safetensors", max_shard_bytes=30_000)


def test_the_state_of_a_weights_only_checkpoint_is_checked(tmp_path: Path) -> None:
    import_hf(write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK), tmp_path / "ckpt")
    assert read_model_config(tmp_path / "ckpt") == DEEPSEEK
    state = tmp_path / "ckpt" / "state.json"

    def rewrite(document: dict[str, object]) -> None:
        state.write_text(json.dumps(document))
        recommit(tmp_path / "ckpt")

    recipe = {key: value for key, value in flatten(Recipe(model=DEEPSEEK)).items() if key.startswith("model.")}
    del recipe["model.d_model"]
    recipe["model.moe.top_q"] = 3
    rewrite({WEIGHTS_ONLY: True, "recipe": recipe})
    with pytest.raises(UserError, match=r"state\.json: 2 errors\n(.|\n)*model\.d_model: missing"):
        read_model_config(tmp_path / "ckpt")
    rewrite({WEIGHTS_ONLY: True})
    with pytest.raises(UserError, match="incomplete checkpoint state: it lacks recipe"):
        read_state(tmp_path / "ckpt")


def test_from_pretrained(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "deepseek_v3", DEEPSEEK, torch.bfloat16)
    model = moefoundry.from_pretrained(str(hf))
    expected = AutoModelForCausalLM.from_pretrained(hf, torch_dtype=torch.float32)(ids()).logits
    torch.testing.assert_close(model(ids()), expected, rtol=0, atol=1e-4)
    cfg = replace(DEEPSEEK, moe=replace(DEEPSEEK.moe, expert_hidden_size=24))  # rows of whole 16 bytes in BF16
    narrow_hf = write_hf(tmp_path / "narrow", "deepseek_v3", cfg)
    narrow = moefoundry.from_pretrained(narrow_hf, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in narrow.buffers()} == {torch.float32}
    assert narrow(ids()).dtype == torch.bfloat16
    assert not narrow.training
    tied = moefoundry.from_pretrained(write_hf(tmp_path / "tied", "llama", family_config("llama", "tied")))
    assert tied.lm_head.weight is tied.embed_tokens.weight


def test_a_model_that_is_not_there_is_to_be_downloaded_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"OLMoE: no such directory; .* download ORGANIZATION/OLMoE --local-dir "):
        import_hf(tmp_path / "OLMoE", tmp_path / "imported")
    file = tmp_path / "my.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=rf"^{file}: is a file; name the directory that holds config.json: {tmp_path}$"):
        import_hf(file, tmp_path / "imported")


def test_importing_the_package_is_light() -> None:
    code = "import sys, moefoundry; moefoundry.load_recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def starting_from(checkpoint: Path, overrides: list[str], *changes: str) -> Recipe:
    """The recipe beside an imported checkpoint, on the tiny corpus."""
    kept = [override for override in overrides if not override.startswith("model.")]
    return load_recipe(
        checkpoint / "recipe.yaml", [*kept, "precision.compute=fp32", "train_loader.num_workers=0", *changes]
    )


def test_a_run_starts_from_imported_weights(
    tiny_overrides: Callable[..., list[str]], tmp_path: Path, tiny_corpus: Path
) -> None:
    """On any mesh, in fp32, and from its first batch; its own checkpoint is exported with its tokenizer."""
    cfg = replace(MIXTRAL, vocab_size=384)
    import_hf(write_hf(tmp_path / "hf", "mixtral", cfg, torch.bfloat16), tmp_path / "imported")
    overrides = tiny_overrides(tmp_path / "run", "max_duration=2ba", "optimizer.lr=1e-9")
    on_mesh = ("mesh={replicate: 1, shard: 2, expert: 2}", "model.moe.balance.aux_loss_weight=0.02")
    run_distributed(save_trained, 2, starting_from(tmp_path / "imported", overrides, *on_mesh))
    assert read_state(tmp_path / "run/checkpoints/ba2")["timestamp"]["batch"] == 2
    export_hf(tmp_path / "run", tmp_path / "back")
    read, source = contents(tmp_path / "back"), contents(tmp_path / "hf")
    for name, tensor in source.items():
        assert read[name].dtype == torch.float32
        torch.testing.assert_close(read[name], tensor.float(), rtol=0, atol=1e-8, msg=name)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (tiny_corpus / "tokenizer/tokenizer.json").read_bytes()
    assert read_json(tmp_path / "back")["max_position_embeddings"] == 64
    other = starting_from(tmp_path / "imported", overrides, f"run_dir={tmp_path / 'other'}", "model.moe.top_k=2")
    with pytest.raises(UserError, match=r"another architecture:\n  model\.moe\.top_k: 3 there, 2 here"):
        run_distributed(save_trained, 1, other)


def test_imported_weights_may_be_balanced_by_a_bias(tiny_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """Which they do not have: it starts at 0, and is of the run's own checkpoints."""
    import_hf(write_hf(tmp_path / "hf", "mixtral", replace(MIXTRAL, vocab_size=384)), tmp_path / "imported")
    changes = ("max_duration=2ba", "model.moe.balance.bias_update_rate=0.01")
    recipe = starting_from(tmp_path / "imported", tiny_overrides(tmp_path / "run"), *changes)
    run_distributed(save_trained, 1, recipe)
    bias = load_model(tmp_path / "run/checkpoints/ba2").layers[1].ffn.router.expert_bias
    assert 0 < bias.abs().max().item() <= 0.021


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "deepseek_v3")]
)
def test_the_whole_way(tiny_overrides: Callable[..., list[str]], tmp_path: Path, family: str) -> None:
    """Imported, trained on a mesh of every axis, exported: transformers computes our loss with the trained weights."""
    cfg = replace(family_config(family, mtp_depth=1 if family == "deepseek_v3" else 0), vocab_size=384)
    import_hf(write_hf(tmp_path / "hf", family, cfg), tmp_path / "imported")
    changes = (
        "max_duration=8ba",
        "optimizer.lr=3e-3",
        "mesh={replicate: 2, shard: 2, expert: 2}",
        "model.moe.balance.bias_update_rate=" + ("0.01" if family == "deepseek_v3" else "0.0"),
    )
    recipe = starting_from(tmp_path / "imported", tiny_overrides(tmp_path / "run"), *changes)
    run_distributed(save_trained, 4, recipe)
    export_hf(tmp_path / "run", tmp_path / "back", family)
    batch = torch.randint(384, (4, 32), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        ours = load_model(tmp_path / "run/checkpoints/ba8")(batch, batch).lm
        torch.testing.assert_close(ours, theirs(batch, labels=batch).loss, rtol=1e-5, atol=0)
        before = load_model(tmp_path / "imported")(batch, batch).lm
    assert (ours - before).abs() > 0.01, "training has changed the model"
    trained = contents(tmp_path / "back")
    assert [name for name, tensor in contents(tmp_path / "hf").items() if torch.equal(tensor, trained[name])] == []


# --------------------------------------------------------------------------------------------------------- command line


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", "mixtral", MIXTRAL)
    steps = [
        "import --hf {0}/hf --output {0}/checkpoint --dtype fp32 --verify",
        "export --checkpoint {0}/checkpoint --hf {0}/back --family mixtral --max-shard-size 50KB --verify",
        "export {0}/checkpoint -o {0}/narrow --dtype bf16 --verify",
        "import {0}/hf -o {0}/narrow_checkpoint --dtype bf16 --verify",
        "consolidate {0}/checkpoint --output {0}/weights.safetensors",
    ]
    for step in steps:
        assert main(["convert", *step.format(tmp_path).split()]) == 0
    assert capsys.readouterr().out.count("verified, logits differ by at most") == 4
    assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    assert main(["convert", "export", "--checkpoint", str(tmp_path), "--hf", str(tmp_path / "x")]) == 2
    assert f"error: {tmp_path}: no complete checkpoint there" in capsys.readouterr().err


def test_the_script_explains_itself() -> None:
    command = [sys.executable, "scripts/convert_ckpt.py", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert all(action in done.stdout for action in ("import", "export", "consolidate", "upcycle"))


@pytest.mark.parametrize("size", ["5", "GB", "0B", "-1GB", "5TB"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "export", "a", "-o", "b", f"--max-shard-size={size}"]) == 2
    assert f"{size!r} is no size" in capsys.readouterr().err


def read_json(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())
