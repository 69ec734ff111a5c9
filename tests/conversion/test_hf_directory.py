"""Hugging Face directories as tools leave them: fused, with less than they declare, and with pointers for files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moefoundry
from moefoundry.config import MtpConfig, UserError
from moefoundry.conversion.convert import export_hf, import_hf, load_model
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.hf_directory import open_hf
from tests.conversion.hf import (
    assert_same_tensors,
    change_config,
    contents,
    family_config,
    family_tensors,
    fused,
    write_hf,
    write_tokenizer,
    write_version_5,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning", "ignore:Initializing zero-element:UserWarning"
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


# ------------------------------------------------------------------------------------------- as transformers 5 has them


@pytest.mark.parametrize(
    ("family", "variant"),
    [("mixtral", "yarn"), ("qwen3_moe", "window"), ("deepseek_v3", "yarn"), ("deepseek_v3", "moonlight")],
)
def test_fused_experts_are_split_exactly_and_verified(tmp_path: Path, family: str, variant: str) -> None:
    """With any version of transformers: 4 passes over ``rope_parameters``, and would compute another model."""
    cfg = family_config(family, variant)
    newer = write_version_5(tmp_path / "newer", family, cfg)
    assert any(name.endswith("gate_up_proj") for name in contents(newer))
    summary = import_hf(newer, tmp_path / "checkpoint", tolerance=1e-4)
    assert summary.parity is not None
    export_hf(tmp_path / "checkpoint", tmp_path / "back", family)
    assert_same_tensors(tmp_path / "back", write_hf(tmp_path / "older", family, cfg))


def test_fused_experts_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefoundry.checkpoint.out_of_core.SHARD_BYTES", 500)
    import_hf(write_version_5(tmp_path / "hf", "olmoe", family_config("olmoe")), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", "olmoe")
    assert_same_tensors(tmp_path / "back", write_hf(tmp_path / "older", "olmoe", family_config("olmoe")))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "gate_up_proj",
            torch.zeros(9, 40, 32),
            r"experts\.gate_up_proj: has shape \(9, 40, 32\), and the model has 8 exp",
        ),
        ("gate_up_proj", torch.zeros(8, 41, 32), r"\(8, 41, 32\), and holds two matrices of equally many rows"),
        (
            "gate_up_proj",
            torch.zeros(8, 32, 40),
            r"experts\.0\.gate_proj\.weight: has shape \(16, 40\), not \(20, 32\)",
        ),
        ("down_proj", None, r"experts\.0\.down_proj\.weight: missing"),
    ],
)
def test_fused_experts_that_are_not_the_models_are_named(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = fused(family_tensors("olmoe", family_config("olmoe")))
    tensors.pop(key := f"model.layers.1.mlp.experts.{name}")
    hf = write_hf(tmp_path / "hf", "olmoe", family_config("olmoe"))
    save_file(tensors | ({} if tensor is None else {key: tensor}), hf / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_hf(hf)


# ------------------------------------------------------------------------------------------------ less than is declared


@pytest.mark.parametrize("stored", [0, 1])
def test_prediction_modules_that_are_not_there_are_not_read(
    tmp_path: Path, stored: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers drops them and keeps their number."""
    hf = write_hf(tmp_path / "hf", "deepseek_v3", family_config("deepseek_v3", mtp_depth=stored))
    change_config(hf, num_nextn_predict_layers=2)
    import_hf(hf, tmp_path / "checkpoint")
    note = (
        f"config.json declares 2 module(s) of multi-token prediction and the files hold {stored}: read with mtp.depth"
    )
    assert capsys.readouterr().err == f"note: {note} {stored}\n"
    assert load_model(tmp_path / "checkpoint").cfg == family_config("deepseek_v3", mtp_depth=stored)
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", hf)
    with pytest.warns(UserWarning, match="the files hold"):
        assert moefoundry.from_pretrained(hf).cfg.mtp.depth == stored


def test_a_prediction_module_that_is_there_in_part_is_an_error(tmp_path: Path) -> None:
    cfg = replace(family_config("deepseek_v3"), mtp=MtpConfig(depth=1))
    changed = {f"model.layers.{cfg.n_layers}.eh_proj.weight": None}
    with pytest.raises(UserError, match=r"eh_proj\.weight: missing"):
        open_hf(write_hf(tmp_path / "hf", "deepseek_v3", cfg, **changed))


def test_tensors_without_elements_may_be_there_and_are_not_written(tmp_path: Path) -> None:
    cfg = family_config("deepseek_v3", "no_shared")
    empty = {name: torch.zeros(shape) for name, shape in FAMILIES["deepseek_v3"].unused_tensors(cfg).items()}
    assert len(empty) == 6
    hf = write_hf(tmp_path / "hf", "deepseek_v3", cfg)
    whole = write_hf(tmp_path / "whole", "deepseek_v3", cfg, **empty)
    assert contents(whole).keys() - contents(hf).keys() == empty.keys()
    import_hf(whole, tmp_path / "checkpoint", tolerance=1e-4)
    export_hf(tmp_path / "checkpoint", tmp_path / "back", "deepseek_v3", tolerance=1e-4)
    assert contents(tmp_path / "back").keys() == contents(hf).keys()
    assert_same_tensors(tmp_path / "back", hf)


def test_no_error_is_a_wall(tmp_path: Path) -> None:
    cfg = family_config("deepseek_v3", mtp_depth=1)
    hf = write_hf(tmp_path / "hf", "deepseek_v3", cfg)
    kept = {name: tensor for name, tensor in contents(hf).items() if "experts" not in name}
    extra = {f"extra.{index}": torch.zeros(1) for index in range(30)}
    save_file({**kept, **extra, "model.norm.weight": torch.zeros(3)}, hf / "model.safetensors")
    with pytest.raises(UserError) as raised:
        open_hf(hf)
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + 5 + 1 + 5
    missing = len(family_tensors("deepseek_v3", cfg)) - len(kept)
    assert f"  ... and {missing - 4} more missing" in lines
    assert "  model.norm.weight: has shape (3,), not (32,)" in lines
    assert "  ... and 26 more not expected" in lines


# ------------------------------------------------------------------------------------------------------------- pointers


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_a_git_lfs_pointer_is_called_that(tmp_path: Path, file: str) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", family_config("mixtral"))
    for path in write_tokenizer(tmp_path / "tokenizer").iterdir():
        path.rename(hf / path.name)
    (hf / file).write_text(POINTER)
    with pytest.raises(UserError) as raised:
        import_hf(hf, tmp_path / "checkpoint")
    assert str(raised.value) == f"{hf / file}: a git-lfs pointer, not the file itself; `git lfs pull` there fetches it"
    assert not (tmp_path / "checkpoint").exists()


# ----------------------------------------------------------------------------------------------------- what is not here


@pytest.mark.parametrize(
    ("family", "tensors"),
    [
        ("hy_v3", ("model.layers.3.enorm.weight", "model.layers.3.mlp.experts.0.up_proj.weight")),
        ("ernie4_5_moe", ("model.mtp_emb_norm.0.weight", "model.mtp_block.0.mlp.up_proj.weight")),
    ],
)
def test_modules_that_predict_further_tokens_are_left_out_with_a_note(
    tmp_path: Path, family: str, tensors: tuple[str, ...]
) -> None:
    """Where they are published in a form that is not read here, as the config says."""
    cfg = family_config(family)
    hf = write_hf(tmp_path / "hf", family, cfg)
    save_file(contents(hf) | {name: torch.ones(2) for name in tensors}, hf / "model.safetensors")
    source = open_hf(change_config(hf, num_nextn_predict_layers=1))
    assert source.cfg == cfg
    assert len(source.notes) == 1
    assert source.notes[0].startswith("the module that predicts a further token is left out: 2 tensors model.")
    save_file(contents(hf) | {"model.layers.9.enorm.weight": torch.ones(2)}, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.9\.enorm\.weight: not expected"):
        open_hf(hf)


def test_a_quantization_that_is_not_read_is_named_without_its_lists(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", family_config("mixtral"))
    weights = {"num_bits": 8, "type": "float", "symmetric": True}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [f"model.layers.{index}.mlp.gate" for index in range(999)],
    }
    with pytest.raises(UserError) as raised:
        open_hf(change_config(hf, quantization_config=config))
    text = str(raised.value)
    assert '"format": "float-quantized", "weights": {"num_bits": 8' in text
    assert "INT4 weights of compressed-tensors" in text
    assert len(text.splitlines()) == 1
    assert len(text) < 500
