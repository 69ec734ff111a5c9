"""Adapters merged, exported to peft and imported from it compute the same, there and here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moefoundry.adapters import apply_lora, trained_names
from moefoundry.checkpoint.base import whole_base
from moefoundry.checkpoint.weights import Weights, load_model, read_model_config
from moefoundry.cli.main import main
from moefoundry.config import ConfigError, LoraConfig, RouterConfig, UserError
from moefoundry.conversion.adapted import Adapters
from moefoundry.conversion.convert import consolidate, export_hf, import_hf, merge_adapters
from moefoundry.conversion.families import exports_as
from moefoundry.conversion.peft import export_peft
from moefoundry.conversion.peft_import import import_peft, write_adapters
from moefoundry.conversion.peft_names import ExpertKind
from moefoundry.conversion.peft_settings import DEFAULTS, INERT, INITIALIZATIONS, PLAIN, read_settings
from moefoundry.conversion.reference import NEWER, newer_transformers
from moefoundry.model.transformer import MoETransformer, meta_model
from tests.conversion.families.models import GQA, VOCAB, sparse
from tests.conversion.hf import family_config, write_hf
from tests.conversion.oracle import SCRIPT, needs_oracle
from tests.conversion.test_equivalents import CASES as EQUIVALENT
from tests.conversion.test_equivalents import write_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
CASES = [("mixtral", "plain"), ("olmoe", "clipped"), ("qwen3_moe", "dense_between"), ("deepseek_v3", "plain")]
LINEARS = ["attention", "dense", "shared_experts"]
LORA = LoraConfig(rank=4, alpha=6.0)
ABSOLUTE = 3e-5  # of logits of about 1, as between transformers and here without adapters
cases = pytest.mark.parametrize(("family", "variant"), CASES, ids=["-".join(case) for case in CASES])


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def adapted(checkpoint: Path, lora: LoraConfig) -> MoETransformer:
    """The model of a checkpoint, with random adapters beside its weights."""
    model = load_model(checkpoint)
    apply_lora(model, lora)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("magnitude.weight"):
            weight = dict(model.named_parameters())[name.replace("lora.magnitude.weight", "weight")]
            parameter.data = weight.data.norm(dim=1) * (1 + 0.1 * torch.rand(len(weight), generator=generator))
        elif ".lora." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make(tmp_path: Path, family: str, variant: str, lora: LoraConfig = LORA) -> MoETransformer:
    """tmp_path/hf, a model; tmp_path/base, its checkpoint; tmp_path/adapters on top of it, whose model is returned."""
    write_hf(tmp_path / "hf", family, family_config(family, variant))
    import_hf(tmp_path / "hf", tmp_path / "base")
    return on_base(tmp_path, lora)


def on_base(tmp_path: Path, lora: LoraConfig = LORA) -> MoETransformer:
    """tmp_path/adapters on top of tmp_path/base, whose model is returned."""
    model = adapted(tmp_path / "base", lora)
    (tmp_path / "adapters").mkdir()
    values = {name: tensor for name, tensor in model.state_dict().items() if name in trained_names(model)}
    cfg = read_model_config(tmp_path / "base")
    write_adapters(tmp_path / "adapters", cfg, lora, values, whole_base(tmp_path / "base"))
    return model


@torch.no_grad()
def assert_same(found: Tensor, expected: Tensor, tolerance: float = ABSOLUTE) -> None:
    assert expected.std() > 0.1, "there is something to compare"
    assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_merged_into_a_checkpoint(tmp_path: Path, dora: bool) -> None:
    model = make(tmp_path, "deepseek_v3", "plain", replace(LORA, dora=dora, train_router=True, use_rslora=True))
    summary = merge_adapters(tmp_path / "adapters", tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert summary.num_tensors == len(merged.state_dict())
    expected = model(ids())
    assert (load_model(tmp_path / "base")(ids()) - expected).abs().max() > 0.1
    assert_same(merged(ids()), expected)
    assert_same(load_model(tmp_path / "adapters")(ids()), expected)
    consolidate(tmp_path / "adapters", tmp_path / "all.safetensors")
    for name, tensor in load_file(tmp_path / "all.safetensors").items():
        assert torch.equal(tensor, merged.state_dict()[name]), name


@torch.no_grad()
def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a base that has been moved."""
    expected = make(tmp_path, "qwen3_moe", "dense_between")(ids())
    (tmp_path / "base").rename(tmp_path / "moved")
    where = ["--base", str(tmp_path / "moved")]
    adapters = str(tmp_path / "adapters")
    assert main(["convert", "merge", adapters, "-o", str(tmp_path / "merged")]) == 2
    assert "base of the adapters in" in capsys.readouterr().err
    assert main(["convert", "merge", adapters, "-o", str(tmp_path / "merged"), *where]) == 0
    assert_same(load_model(tmp_path / "merged")(ids()), expected)
    assert main(["convert", "export", adapters, "-o", str(tmp_path / "whole"), "--merge", "--verify", *where]) == 0
    assert main(["convert", "export", adapters, "-o", str(tmp_path / "peft")]) == 0
    assert main(["convert", "import", str(tmp_path / "peft"), "-o", str(tmp_path / "again")]) == 2
    assert "name the checkpoint of their base" in capsys.readouterr().err
    assert main(["convert", "import", str(tmp_path / "peft"), "-o", str(tmp_path / "again"), *where]) == 0
    assert_same(load_model(tmp_path / "again")(ids()), expected)


@pytest.mark.parametrize("kind", ExpertKind)
@pytest.mark.parametrize(("family", "variant"), [*CASES, ("hy_v3", "plain")])
@torch.no_grad()
def test_what_is_exported_is_imported(tmp_path: Path, family: str, variant: str, kind: ExpertKind) -> None:
    model = make(tmp_path, family, variant, replace(LORA, use_rslora=True))
    export_peft(tmp_path / "adapters", tmp_path / "peft", kind=kind, family_name=family)
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again", family)
    assert_same(load_model(tmp_path / "again")(ids()), model(ids()))


@pytest.mark.parametrize("kind", ExpertKind)
@pytest.mark.parametrize("case", ["quickstart", "scale", "all"])
@torch.no_grad()
def test_adapters_are_scaled_as_their_weights_are(tmp_path: Path, case: str, kind: ExpertKind) -> None:
    """Of a base that is exported as a model which computes the same; an import undoes it to the last bit."""
    cfg, family = EQUIVALENT[case]
    write_model(tmp_path / "base", cfg)
    model = on_base(tmp_path)
    export_peft(tmp_path / "adapters", tmp_path / "peft", kind=kind)
    assert exports_as(cfg).startswith(f"{family}, which computes the same")
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again")
    assert_same(load_model(tmp_path / "again")(ids()), model(ids()))
    stored, found = (
        Adapters(tmp_path / name, LORA, meta_model(cfg), Weights.trained).stored for name in ("adapters", "again")
    )
    for name in (name for name in stored.specs if ".lora." in name):
        assert torch.equal(stored.read(name), found.read(name)), name
    ours, theirs = stored.read, load_file(tmp_path / "peft/adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    if cfg.moe.num_shared_experts:
        key = f"{prefix}.mlp.shared_expert.down_proj.lora_B.weight"
        assert torch.equal(theirs[key], 2 * ours("layers.1.ffn.shared_experts.down_proj.lora.b"))
    if kind == ExpertKind.separate:
        name = "block_sparse_moe.experts.3.w2" if family == "mixtral" else "mlp.experts.3.down_proj"
        expert = ours("layers.1.ffn.experts.lora.down_proj.b", (3, 4))[0]
        assert torch.equal(theirs[f"{prefix}.{name}.lora_B.weight"], cfg.moe.router.scale * expert)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral", "model.moe.num_shared_experts: 1, and mixtral has 0"),
        ("deepseek_v3", "model.attention.kind: gqa, and deepseek_v3 has mla"),
        ("unknown", "no model family 'unknown'"),
    ],
)
def test_a_family_that_lacks_the_model_is_refused(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "base", EQUIVALENT["quickstart"][0])
    on_base(tmp_path)
    where = ["convert", "export", str(tmp_path / "adapters"), "-o", str(tmp_path / "peft"), "--family", name]
    assert main(where) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


def test_without_any_family_adapters_can_be_merged(tmp_path: Path) -> None:
    write_model(tmp_path / "base", sparse(GQA, RouterConfig(scale=3.0)))
    on_base(tmp_path)
    with pytest.raises(UserError, match=r"stay here; moefoundry convert merge merges them$") as error:
        export_peft(tmp_path / "adapters", tmp_path / "peft")
    assert "no Hugging Face family computes what this model does" in str(error.value)


def test_buffers_that_have_moved_are_refused(tmp_path: Path) -> None:
    """Expert biases that the run has gone on to balance with; peft's files hold none, and the base has others."""
    make(tmp_path, "deepseek_v3", "plain")
    export_peft(tmp_path / "adapters", tmp_path / "same")
    cfg = read_model_config(tmp_path / "base")
    stored = Adapters(tmp_path / "adapters", LORA, meta_model(cfg), Weights.trained).stored
    values = {name: stored.read(name) + ("expert_bias" in name) for name in stored.specs}
    (tmp_path / "moved").mkdir()
    write_adapters(tmp_path / "moved", cfg, LORA, values, whole_base(tmp_path / "base"))
    with pytest.raises(UserError, match=r"router\.expert_bias have moved, which peft's files do not hold"):
        export_peft(tmp_path / "moved", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("option", ["--dtype=bf16", "--max-shard-size=1MB", "--tokenizer=there"])
def test_options_of_whole_models_are_refused(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "olmoe", "plain")
    assert main(["convert", "export", str(tmp_path / "adapters"), "-o", str(tmp_path / "peft"), option]) == 2
    assert (
        f"{option.partition('=')[0]}: of a whole model, and adapters are exported; --merge" in capsys.readouterr().err
    )
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("targets", [["experts.up_proj"], ["experts.gate_proj", "experts.down_proj"]], ids=str)
@torch.no_grad()
def test_some_experts_weights_in_one_parameter(tmp_path: Path, targets: list[str]) -> None:
    model = make(tmp_path, "olmoe", "plain", replace(LORA, targets=targets))
    export_peft(tmp_path / "adapters", tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again")
    assert_same(load_model(tmp_path / "again")(ids()), model(ids()))


@torch.no_grad()
def test_fused_adapters_that_peft_has_trained(tmp_path: Path) -> None:
    """Gate and up then share their A; ranks differ from layer to layer."""
    make(tmp_path, "olmoe", "plain", replace(LORA, targets=["attention.q_proj"]))
    generator = torch.Generator().manual_seed(5)
    base = load_model(tmp_path / "base").state_dict()
    name = "layers.1.ffn.experts"
    experts, width, d_model = base[f"{name}.gate_proj"].shape
    rank, prefix = 6, "base_model.model.model.layers.1"
    tensors = {
        f"{prefix}.mlp.experts.lora_A.weight": torch.randn(experts * rank, d_model, generator=generator),
        f"{prefix}.mlp.experts.lora_B.weight": torch.randn(2 * width, rank * experts, generator=generator),
        f"{prefix}.self_attn.q_proj.lora_A.weight": torch.randn(2, d_model, generator=generator),
        f"{prefix}.self_attn.q_proj.lora_B.weight": torch.randn(d_model, 2, generator=generator),
    }
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["mlp.experts.gate_up_proj"]}
    config |= {"rank_pattern": {"gate_up_proj": rank}, "alpha_pattern": {"gate_up_proj": 12}}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "imported")
    found = load_model(tmp_path / "imported").state_dict()
    a, b, a_q, b_q = tensors.values()
    both = torch.einsum("ore,eri->eoi", b.reshape(2 * width, rank, experts), a.reshape(experts, rank, d_model)) * 12 / 6
    changed = {
        f"{name}.gate_proj": both[:, :width],
        f"{name}.up_proj": both[:, width:],
        "layers.1.attention.q_proj.weight": b_q @ a_q * 3 / 2,
    }
    for weight, value in base.items():
        torch.testing.assert_close(found[weight], value + changed.get(weight, 0), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "lora", "kind", "words"),
    [
        ("dbrx", LORA, "fused", "dbrx has layers.0.attention.q_proj.weight as a part of"),
        ("olmoe", replace(LORA, train_router=True), "fused", "its routers have been trained"),
        ("olmoe", replace(LORA, dora=True), "fused", "peft has no DoRA where down_proj, gate_up_proj have adapters"),
    ],
)
def test_what_peft_lacks_is_refused(tmp_path: Path, family: str, lora: LoraConfig, kind: str, words: str) -> None:
    make(tmp_path, family, "plain", lora)
    with pytest.raises(UserError) as error:
        export_peft(tmp_path / "adapters", tmp_path / "peft", family, ExpertKind(kind))
    assert words in str(error.value)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, and not LORA"),
        ({"bias": "all"}, 'bias: got "all"; allowed: "none"'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save: got ["lm_head"]; allowed: null'),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights: got "pissa_niter_4"; allowed: true, false, '),
        ({"use_of_tomorrow": False}, "use_of_tomorrow: got false, and this key is not known here"),
        ({"use_bdlora": {"nblocks": 2}}, "set it to null"),
    ],
)
def test_files_that_are_no_such_adapters(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    make(tmp_path, "olmoe", "plain", replace(LORA, targets=["attention"]))
    export_peft(tmp_path / "adapters", tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError) as error:
        import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again")
    assert words in str(error.value)


def test_adapters_of_another_model_are_named(tmp_path: Path) -> None:
    make(tmp_path, "olmoe", "plain", replace(LORA, targets=["attention"]))
    export_peft(tmp_path / "adapters", tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(
        {**load_file(path), "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, path
    )
    with pytest.raises(UserError, match=r"no place in the model for base_model.model.model.layers.7"):
        import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again")


# ------------------------------------------------------------------------------------------------------------ with peft


@pytest.fixture
def with_peft() -> Callable[[Path, Path], Any]:
    """Load a model of transformers with the adapters in a directory."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    def load(hf: Path, adapters: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(hf, torch_dtype=torch.float32, attn_implementation="eager")
        return peft.PeftModel.from_pretrained(model, adapters, is_trainable=True).eval()

    return load


@cases
def test_peft_computes_the_same(tmp_path: Path, with_peft: Any, family: str, variant: str) -> None:
    """Logits, and gradients of every adapter, with the transformers of this environment: experts are layers there."""
    model = make(tmp_path, family, variant)
    export_peft(tmp_path / "adapters", tmp_path / "peft", family, ExpertKind.separate)
    theirs = with_peft(tmp_path / "hf", tmp_path / "peft")
    logits, expected = model(ids()), theirs(ids()).logits
    assert_same(logits, expected)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    for each in (logits, expected):
        (each * weights).mean().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()
    values = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    (tmp_path / "gradients").mkdir()
    write_adapters(
        tmp_path / "gradients", model.cfg, LORA, values, whole_base(tmp_path / "base")
    )  # whose export has the names of theirs
    export_peft(tmp_path / "gradients", tmp_path / "ours", family, ExpertKind.separate)
    for name, gradient in load_file(tmp_path / "ours" / "adapter_model.safetensors").items():
        found = gradients[name]
        found = torch.zeros_like(gradient) if found is None else found  # of an expert that no token has
        assert (gradient - found).norm() <= 1e-4 * found.norm() + 1e-9, name


@pytest.mark.parametrize("case", ["quickstart", "scale", "all"])
@pytest.mark.usefixtures("with_peft")
def test_adapters_on_an_equivalent_base_are_verified(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "base", EQUIVALENT[case][0])
    on_base(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    command = ["convert", "export", str(tmp_path / "adapters"), "--experts", "separate", "--verify"]
    where = ["--base", str(tmp_path / "moved"), "-o", str(tmp_path / "peft")]
    assert main([*command, *where, "--tolerance", "1e-12"]) == 2
    assert "more than 1.0e-12, from those of transformers" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
    assert main([*command, *where, "--tolerance", str(ABSOLUTE)]) == 0
    shown = capsys.readouterr()
    assert f"note: as {exports_as(EQUIVALENT[case][0])}\n" in shown.err
    assert "verified, logits differ by at most" in shown.out
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.usefixtures("with_peft")
def test_dora_on_an_equivalent_base(tmp_path: Path) -> None:
    write_model(tmp_path / "base", EQUIVALENT["quickstart"][0])
    model = on_base(tmp_path, replace(LORA, dora=True, targets=["attention", "shared_experts", "dense"]))
    export_peft(tmp_path / "adapters", tmp_path / "peft", kind=ExpertKind.separate, tolerance=ABSOLUTE)
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again")
    assert_same(load_model(tmp_path / "again")(ids()), model(ids()))


@pytest.mark.usefixtures("with_peft")
def test_what_cannot_be_verified_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "olmoe", "plain")
    monkeypatch.setenv(NEWER, str(tmp_path))
    with pytest.raises(UserError, match="has no fused experts, which these adapters are for; `make oracle` installs"):
        export_peft(tmp_path / "adapters", tmp_path / "peft", tolerance=ABSOLUTE)
    monkeypatch.setattr("moefoundry.conversion.peft.find_spec", lambda name: None)
    with pytest.raises(UserError, match="peft, which is to load the adapters, is not installed"):
        export_peft(tmp_path / "adapters", tmp_path / "peft", kind=ExpertKind.separate, tolerance=ABSOLUTE)
    assert not (tmp_path / "peft").exists()


@torch.no_grad()
def test_dora_of_peft(tmp_path: Path, with_peft: Any) -> None:
    model = make(tmp_path, "qwen2", "plain", replace(LORA, dora=True, targets=["attention", "dense"]))
    export_peft(tmp_path / "adapters", tmp_path / "peft", "qwen2")
    assert_same(model(ids()), with_peft(tmp_path / "hf", tmp_path / "peft")(ids()).logits)
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again", "qwen2")
    assert_same(load_model(tmp_path / "again")(ids()), model(ids()))


def test_every_setting_of_peft_is_known() -> None:
    """What peft writes by default is imported; no key of it is one that nothing here knows."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    defaults = peft.LoraConfig().to_dict() | {"runtime_config": None}
    assert {field.name for field in fields(peft.LoraConfig)} == defaults.keys()
    assert defaults.keys() <= INERT | PLAIN.keys() | DEFAULTS.keys()
    assert not INERT & (PLAIN | DEFAULTS).keys()
    assert not PLAIN.keys() & DEFAULTS.keys()
    for key, value in (PLAIN | DEFAULTS).items():
        assert (defaults[key] or None) == (value or None), key


@pytest.mark.parametrize("key", sorted(PLAIN))
def test_other_settings_than_the_plain_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", key: PLAIN[key]}))
    read_settings(path)
    path.write_text(json.dumps({"peft_type": "LORA", key: {"other": 1}}))
    with pytest.raises(ConfigError) as error:
        read_settings(path)
    assert [problem.path for problem in error.value.problems] == [key]


@pytest.mark.parametrize("initialization", [*INITIALIZATIONS, "pissa", "pissa_niter_2", "olora"])
@torch.no_grad()
def test_initializations_of_peft(tmp_path: Path, with_peft: Any, initialization: bool | str) -> None:
    """Those that leave the base as it is compute the same here; those that change it are refused."""
    import peft

    make(tmp_path, "qwen2", "plain", replace(LORA, targets=["attention"]))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=initialization)
    config.eva_config = peft.EvaConfig() if initialization == "eva" else None
    theirs = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "peft")
    expected = with_peft(tmp_path / "hf", tmp_path / "peft")(ids()).logits
    if initialization not in INITIALIZATIONS:
        with pytest.raises(ConfigError, match="init_lora_weights"):
            import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again", "qwen2")
        return
    import_peft(tmp_path / "peft", tmp_path / "base", tmp_path / "again", "qwen2")
    assert_same(load_model(tmp_path / "again")(ids()), expected)
    assert (load_model(tmp_path / "base")(ids()) - expected).abs().max() > 0.1, "the adapters do something"


@pytest.mark.slow
@needs_oracle
@torch.no_grad()
def test_peft_in_transformers_5_computes_the_same(tmp_path: Path) -> None:
    """Experts are fused there."""
    pytest.importorskip("peft", reason="peft is not installed")
    expected = {}
    for family, variant in CASES:
        model = make_below(tmp_path / family, family, variant)
        export_peft(tmp_path / family / "adapters", tmp_path / family / "peft", family)
        export_hf(tmp_path / family / "base", tmp_path / family / "exported", family)
        expected[family] = model(ids())
    path = os.pathsep.join([str(newer_transformers()), *sys.path])
    command = [sys.executable, str(SCRIPT), "adapt", str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    results = torch.load(tmp_path / "results.pt")
    for family, logits in expected.items():
        assert_same(results[family]["logits"], logits)


@pytest.mark.slow
@needs_oracle
@pytest.mark.parametrize("family", ["hy_v3", "minimax_m2", "phimoe"])
def test_modules_have_the_names_of_transformers_5(tmp_path: Path, family: str) -> None:
    """Which are not those of the files."""
    pytest.importorskip("peft", reason="peft is not installed")
    make(tmp_path, family, "plain")
    export_peft(tmp_path / "adapters", tmp_path / "peft", family, tolerance=ABSOLUTE)


@pytest.mark.slow
@needs_oracle
@pytest.mark.parametrize("case", ["quickstart", "all"])
def test_fused_adapters_on_an_equivalent_base(tmp_path: Path, case: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    write_model(tmp_path / "base", EQUIVALENT[case][0])
    on_base(tmp_path)
    summary = export_peft(tmp_path / "adapters", tmp_path / "peft", tolerance=ABSOLUTE)
    assert summary.parity is not None
    assert summary.parity.transformers.startswith("5.")


def make_below(directory: Path, family: str, variant: str) -> MoETransformer:
    directory.mkdir()
    return make(directory, family, variant)
