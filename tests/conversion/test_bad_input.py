"""Configs and files of Hugging Face that are wrong: one line each that says what, and nothing is written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moefoundry.cli.main import main
from moefoundry.config import UserError
from moefoundry.conversion.convert import import_hf
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.peft_import import import_peft
from tests.conversion.families.models import VARIANTS
from tests.conversion.hf import change_config, write_hf

INDEX = "model.safetensors.index.json"
FILE = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 64, "short_mscale": 1.0, "long_mscale": 1.0}


def written(family: str) -> dict[str, Any]:
    return FAMILIES[family].write_config(VARIANTS[family]["plain"], max_seq_len=64)


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("family", "changes", "culprit"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "model.moe.top_k: 9 experts for each token, but model.moe.num_exp"),
        ("mixtral", {"num_key_value_heads": 3}, "model.attention.n_kv_heads: n_heads 4 is not divisible by 3"),
        ("mixtral", {"num_attention_heads": 5, "head_dim": None}, "model.attention.n_heads: model.d_model 32 is not"),
        ("mixtral", {"hidden_size": 10**30}, "hidden_size: got 1000000000000000000000000000000; allowed: an integer"),
        ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000; allowed: an integer from 1 to 1"),
        ("mixtral", {"rope_theta": 0}, "model.attention.rope_theta: got 0.0; allowed: a number > 0"),
        ("mixtral", {"rope_theta": float("nan")}, "rope_theta: got NaN; allowed: a number of at least 0"),
        ("mixtral", {"rope_theta": float("inf")}, "rope_theta: got Infinity; allowed: a number of at least 0"),
        ("mixtral", {"rms_norm_eps": 10**400}, "rms_norm_eps: got 1000"),
        ("mixtral", {"head_dim": 7}, "model.attention.head_dim: 7 is odd"),
        ("mixtral", {"max_position_embeddings": "4096"}, 'max_position_embeddings: got "4096"; allowed: an integer'),
        ("mixtral", {"router_aux_loss_coef": [0.1]}, "router_aux_loss_coef: got [0.1]; allowed: a number of at least"),
        ("mixtral", {"router_jitter_noise": 2}, "model.moe.router.input_jitter: got 2.0"),
        ("mixtral", {"rope_scaling": YARN | {"factor": 0.5}}, "model.attention.yarn.factor: got 0.5"),
        ("mixtral", {"rope_scaling": YARN | {"beta_fast": 0.5}}, "model.attention.yarn.beta_fast: 0.5 rotations are f"),
        (
            "mixtral",
            {"rope_scaling": {"type": ["yarn"]}},
            'rope_scaling.type: got ["yarn"]; allowed: yarn, llama3, def',
        ),
        (
            "gpt_oss",
            {"layer_types": [["full_attention"], {}, 3]},
            'layer_types: got [["full_attention"], {}, 3]; allow',
        ),
        (
            "qwen3_moe",
            {"mlp_only_layers": [-1]},
            "mlp_only_layers: got [-1]; allowed: a list of integers of at least 0",
        ),
        ("qwen2", {"use_mrope": True}, "use_mrope: got true; allowed: false"),
        ("deepseek_v3", {"n_group": 3}, "model.moe.router.num_groups: model.moe.num_experts 8 is not divisible by 3"),
        ("deepseek_v3", {"qk_rope_head_dim": 3}, "model.attention.qk_rope_head_dim: 3 is odd"),
        ("deepseek_v32", {"num_hidden_layers": "3"}, 'num_hidden_layers: got "3"; allowed: an integer from 1 to'),
        ("granitemoe", {"num_attention_heads": 999}, "model.attention.n_heads: model.d_model 32 is not divisible by 9"),
        (
            "hunyuan_v1_moe",
            {"rope_scaling": {"type": "dynamic", "alpha": "x"}},
            'rope_scaling.type: got "dynamic"; all',
        ),
        ("hunyuan_v1_moe", {"hidden_size": None, "rope_scaling": {"type": "dynamic", "alpha": 9}}, "hidden_size: miss"),
        (
            "phimoe",
            {"rope_scaling": LONGROPE | {"short_factor": [1.0], "long_factor": [1.0]}},
            "longrope.short_factors",
        ),
        ("minimax_m2", {"rotary_dim": 99}, "rotary_dim: got 99; allowed: 6"),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "model.attention.rotary_fraction: got 1.5"),
        ("exaone_moe", {"is_moe_layer": [True, True, True]}, "is_moe_layer: got [true, true, true]; allowed: [false"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full"]}, 'indexer_types: got ["full", "shared", "full"]'),
    ],
)
def test_a_model_that_no_recipe_may_have_is_named(family: str, changes: dict[str, Any], culprit: str) -> None:
    with pytest.raises(UserError) as raised:
        FAMILIES[family].model_of(written(family) | changes)
    assert culprit in str(raised.value)
    assert all(len(line) < 400 for line in str(raised.value).splitlines())


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen2", {"use_mrope": False}),
        ("dots1", {"use_sliding_window": False}),
        ("granitemoe", {"attention_dropout": 0.1, "activation_function": "silu", "router_jitter_noise": 0.0}),
        ("mellum", {"use_sliding_window": True, "max_window_layers": 0}),
        ("deepseek_v3", {"aux_loss_alpha": None, "router_aux_loss_coef": None}),
    ],
)
def test_what_published_files_say_beside_their_model_is_read(family: str, said: dict[str, Any]) -> None:
    hf = written(family) | said
    cfg = FAMILIES[family].model_of(hf)
    assert cfg == FAMILIES[family].model_of(written(family))
    assert FAMILIES[family].balance(cfg, hf) == FAMILIES[family].balance(cfg, written(family))


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("whole") / "hf", "mixtral", VARIANTS["mixtral"]["plain"])


def with_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    return lambda hf: save_file(change(load_file(hf / FILE)), hf / FILE)


def with_another(**tensors: Tensor) -> Callable[[Path], object]:
    """``q_proj``, and what is beside it by the ends of their names, where None is its own."""
    named = {QUERY if name == "itself" else f"{QUERY}{name}": tensor for name, tensor in tensors.items()}
    return with_tensors(lambda found: found | named)


def index(text: str) -> Callable[[Path], object]:
    return lambda hf: (hf / INDEX).write_text(text)


def config(text: str) -> Callable[[Path], object]:
    return lambda hf: (hf / "config.json").write_text(text)


FP8 = torch.ones(32, 32).to(torch.float8_e4m3fn)
PACKED = {"_packed": torch.zeros(32, 4, dtype=torch.int32), "_scale": torch.ones(32, 1)}
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep config": (config("[" * 100_000), "config.json: unreadable: maximum recursion depth"),
    "config of another model": (
        lambda hf: change_config(hf, num_local_experts=9999),
        r"config.json declares a model of [\d,]+ parameters, and the files hold [\d,]+",
    ),
    "more blocks": (lambda hf: change_config(hf, num_hidden_layers=3), r"model\.layers\.2\.\S+: missing"),
    "no block of FP8": (
        lambda hf: change_config(hf, quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]}),
        r"FP8 weights in blocks, MXFP4, .* can be read, not quantization_config .*\[0, 128\]",
    ),
    "other quantization": (
        lambda hf: change_config(hf, quantization_config={"quant_method": "awq", "bits": 4}),
        r'can be read, not quantization_config \{"quant_method": "awq", "bits": 4\}',
    ),
    "integers": (with_another(itself=torch.ones(32, 32, dtype=torch.int64)), r"floating-point numbers, not \S+: torch"),
    "complex numbers": (
        with_another(itself=torch.ones(32, 32, dtype=torch.complex64)),
        "has the dtype C64, which is n",
    ),
    "scalar": (with_another(itself=torch.tensor(1.0)), r"q_proj\.weight: has shape \(\), not \(32, 32\)"),
    "FP8 scale of a scalar": (
        with_another(itself=FP8, _scale_inv=torch.tensor(1.0)),
        r"has a torch.float32 \(\) _scale_inv;",
    ),
    "INT4 scale of a scalar": (
        with_another(**PACKED | {"_scale": torch.tensor(1.0), "_shape": torch.tensor([32, 32])}),
        r"weight_scale \[O, groups\] and weight_shape \[2\] must be beside",
    ),
    "INT4 shape of no numbers": (
        with_another(**PACKED, _shape=torch.tensor([float("nan"), 32.0])),
        r"q_proj\.weight \(0, 32\) does not fit",
    ),
    "no tensors": (with_tensors(lambda _: {}), r"the files hold 0"),
    "index without tensors": (index('{"weight_map": {}}'), "unreadable index: it names no tensors"),
    "index of null": (index('{"weight_map": {"a": null}}'), "unreadable index: TypeError"),
    "deep index": (index("[" * 100_000), "unreadable index: RecursionError"),
    "path that leaves": (index('{"weight_map": {"a": "../x.safetensors"}}'), r"files outside .* are refused: \.\./x"),
    "path that is absolute": (index('{"weight_map": {"a": "/etc/passwd"}}'), r"files outside .* are refused: /etc/p"),
    "path with a NUL": (index(json.dumps({"weight_map": {"a": "x\0y"}})), "shards of the index are missing"),
    "shard of text": (index('{"weight_map": {"a": "config.json"}}'), "config.json: unreadable safetensors"),
    "huge header": (lambda hf: (hf / FILE).write_bytes(b"\xff" * 8 + b"{}"), "unreadable safetensors"),
    "more than the header says": (
        lambda hf: (hf / FILE).write_bytes((hf / FILE).read_bytes() + b"x"),
        "unreadable safetensors",
    ),
    "link to nothing": (
        lambda hf: ((hf / FILE).unlink(), (hf / FILE).symlink_to(hf / "gone")),
        r"no model\.safetensors and no",
    ),
    "tokenizer of another form": (lambda hf: (hf / "tokenizer.json").write_text("{}"), r"tokenizer\.json"),
    "tokenizer_config of a list": (
        lambda hf: (
            shutil.copy(hf / "config.json", hf / "vocab.json"),
            (hf / "tokenizer_config.json").write_text("[]"),
        ),
        "its tokenizer has no tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_of_bad_files(whole: Path, tmp_path: Path, name: str) -> None:
    change, message = CASES[name]
    hf = shutil.copytree(whole, tmp_path / "hf")
    change(hf)
    with pytest.raises(UserError) as raised:
        import_hf(hf, tmp_path / "checkpoint")
    assert re.search(message, str(raised.value)), str(raised.value)
    assert all(len(line) < 400 for line in str(raised.value).splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import"], "is not among the families: llama, qwen2,"),
        (["upcycle", "--num-experts=4", "--top-k=2"], "is not among the families: llama, qwen2,"),
        (["upcycle", "--num-experts=4", "--top-k=2", "--layers=0-99999999999"], "are no layers; write numbers and ran"),
        (["upcycle", "--num-experts=4", "--top-k=2", "--layers=0,3-1"], "'0,3-1': 3 is after 1"),
    ],
)
def test_a_command_ends_with_one_line_and_its_status(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    hf = shutil.copytree(whole, tmp_path / "hf")
    change_config(hf, model_type="jamba")
    assert main(["convert", arguments[0], str(hf), "-o", str(tmp_path / "out"), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_noise_that_is_no_number_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = write_hf(tmp_path / "dense", "llama", VARIANTS["llama"]["plain"])
    options = ["--num-experts=4", "--top-k=2", "--noise=nan"]
    assert main(["convert", "upcycle", str(dense), "-o", str(tmp_path / "out"), *options]) == 2
    assert "--noise: 'nan' is not a finite number" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("settings", "a", "b", "message"),
    [
        ({"lora_alpha": "x"}, (2, 32), (32, 2), 'lora_alpha: got "x"; allowed: a number above 0'),
        ({"lora_alpha": float("nan")}, (2, 32), (32, 2), "lora_alpha: got NaN; allowed: a number above 0"),
        ({"alpha_pattern": {"(": 1}}, (2, 32), (32, 2), 'alpha_pattern: got {"(": 1}; allowed: patterns with numbers'),
        ({"lora_dropout": 2}, (2, 32), (32, 2), "lora_dropout: got 2; allowed: a number from 0 to less than 1"),
        ({"target_parameters": 3}, (2, 32), (32, 2), "target_parameters: got 3; allowed: a list of names"),
        ({}, (2,), (32, 2), "layers.0.attention.q_proj.weight: an adapter of the shape (2,) does not fit (2, 32)"),
        ({}, (), (32, 2), "q_proj.lora_A.weight () does not fit model.layers.0.self_attn.q_proj"),
        (
            {},
            (2, 31),
            (32, 2),
            "layers.0.attention.q_proj.weight: an adapter of the shape (2, 31) does not fit (2, 32)",
        ),
        ({}, (2, 32), (1, 2), "layers.0.attention.q_proj.weight: an adapter of the shape (1, 2) does not fit (32, 2)"),
        (
            {},
            (2, 32),
            (32, 3),
            "the factors of an adapter have different ranks: (2, 32) and (32, 3)",
        ),
        ({}, (0, 32), (32, 0), "q_proj.lora_A.weight (0, 32) does not fit"),
    ],
)
def test_adapters_that_are_none_are_named(
    base: Path, tmp_path: Path, settings: dict[str, Any], a: tuple[int, ...], b: tuple[int, ...], message: str
) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4} | settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    tensors = {f"{name}_A.weight": torch.ones(a), f"{name}_B.weight": torch.ones(b)}
    save_file(tensors, tmp_path / "peft/adapter_model.safetensors")
    with pytest.raises(UserError) as raised:
        import_peft(tmp_path / "peft", base, tmp_path / "adapters")
    assert message in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"]


@pytest.fixture(scope="module")
def base(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_hf(whole, tmp_path_factory.mktemp("base") / "checkpoint").path
