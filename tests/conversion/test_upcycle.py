"""Sparse upcycling: until training begins, the mixture computes what the dense model does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.cli.main import main
from moefoundry.config import UserError
from moefoundry.conversion.convert import PREFIX, export_hf, load_model
from moefoundry.conversion.tensor_map import Dtype
from moefoundry.conversion.upcycle import Upcycling, upcycle
from moefoundry.parallel import moe_layer_indices, moe_layers
from tests.conversion.families.models import VOCAB, transformers_model
from tests.conversion.hf import contents, family_config, write_hf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

EXACT = {"rtol": 0, "atol": 1e-5}


def ids() -> Tensor:
    return torch.randint(VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def dense_logits(family: str, variant: str) -> Tensor:
    """Of transformers' model whose weights :func:`write_hf` writes."""
    return transformers_model(family, family_config(family, variant))(ids()).logits


@pytest.mark.parametrize(
    ("options", "num_groups"),
    [
        (Upcycling(num_experts=4, top_k=1), 1),
        (Upcycling(num_experts=4, top_k=3), 3),
        (Upcycling(num_experts=8, top_k=2, granularity=2), 1),
        (Upcycling(num_experts=8, top_k=6, granularity=2), 3),
        (Upcycling(num_experts=12, top_k=8, granularity=4), 2),
        (Upcycling(num_experts=4, top_k=4, granularity=4), 1),
        (Upcycling(num_experts=8, top_k=4, granularity=4, layers=frozenset({1})), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(("family", "variant"), [("llama", "plain"), ("qwen2", "plain"), ("qwen3", "biased")])
@torch.no_grad()
def test_logits_are_the_dense_models(
    tmp_path: Path, family: str, variant: str, options: Upcycling, num_groups: int
) -> None:
    hf = write_hf(tmp_path / "hf", family, family_config(family, variant))
    upcycle(hf, tmp_path / "checkpoint", options)
    model, expected = load_model(tmp_path / "checkpoint"), dense_logits(family, variant)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids()), expected, **EXACT)
    assert moe_layer_indices(model) == sorted(options.layers or range(model.cfg.n_layers))
    for layer in moe_layers(model):
        chosen_TK = layer.router(torch.randn(50, model.cfg.d_model)).topk_expert_ids
        copies_TK = chosen_TK // options.granularity
        for token in range(50):
            taken, slices = copies_TK[token].unique(return_counts=True)
            assert len(taken) == num_groups, "whole copies"
            assert slices.tolist() == [options.granularity] * num_groups
        assert len(copies_TK.unique()) == options.num_experts // options.granularity, "different tokens, other copies"


def test_experts_are_slices_of_the_dense_weights(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "llama", family_config("llama"))
    upcycle(hf, tmp_path / "checkpoint", Upcycling(num_experts=8, top_k=4, granularity=4))
    stored, dense = StoredTensors(tmp_path / "checkpoint", PREFIX), contents(hf)
    width = 48 // 4
    for expert, part in ((0, 0), (3, 3), (6, 2)):
        rows = slice(part * width, (part + 1) * width)
        for name, expected in (
            ("gate_proj", dense["model.layers.1.mlp.gate_proj.weight"][rows]),
            ("up_proj", dense["model.layers.1.mlp.up_proj.weight"][rows]),
            ("down_proj", dense["model.layers.1.mlp.down_proj.weight"][:, rows]),
        ):
            read = stored.read(f"layers.1.ffn.experts.{name}", (expert, expert + 1))[0]
            assert torch.equal(read, expected), (expert, name)


def test_router_and_noise_depend_on_the_seed(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "llama", family_config("llama"))
    options = Upcycling(num_experts=4, top_k=2, noise=0.01)
    models = {}
    for name, changed in (("a", {}), ("b", {}), ("c", {"seed": 3}), ("exact", {"noise": 0.0})):
        upcycle(hf, tmp_path / name, replace(options, **changed))
        models[name] = load_model(tmp_path / name)

    def gate(name: str) -> Tensor:
        return moe_layers(models[name])[0].router.gate.weight

    def experts(name: str) -> Tensor:
        return moe_layers(models[name])[0].experts.down_proj

    assert torch.equal(gate("a"), gate("b"))
    assert torch.equal(experts("a"), experts("b"))
    assert not torch.equal(gate("a"), gate("c"))
    noise = experts("a") - experts("exact")
    assert noise.std().item() == pytest.approx(0.01, rel=0.05)
    assert not torch.equal(noise[0], noise[1]), "every expert has its own"
    assert not torch.equal(noise, experts("c") - experts("exact"))
    assert (models["a"](ids()) - dense_logits("llama", "plain")).abs().max() > 1e-3, "by intent"


def test_a_dense_model_becomes_a_mixtral(tmp_path: Path) -> None:
    """The mixture is a checkpoint like any other: transformers computes the same with it."""
    hf = write_hf(tmp_path / "hf", "llama", family_config("llama"), torch.bfloat16)
    summary = upcycle(hf, tmp_path / "checkpoint", Upcycling(num_experts=4, top_k=2), Dtype.fp32)
    assert "no tokenizer" in str(summary)
    export_hf(tmp_path / "checkpoint", tmp_path / "mixtral", "mixtral", tolerance=1e-4)
    assert contents(tmp_path / "mixtral")["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.float32


@pytest.mark.parametrize(("family", "mixture"), [("qwen3", "qwen3_moe"), ("qwen2", "qwen2_moe")])
def test_a_qwen_becomes_a_mixture_of_qwens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, mixture: str
) -> None:
    """With some blocks dense, and nothing said beforehand."""
    hf = write_hf(tmp_path / "hf", family, family_config(family))
    upcycle(hf, tmp_path / "checkpoint", Upcycling(num_experts=4, top_k=2, layers=frozenset({1})))
    assert capsys.readouterr().err == ""
    export_hf(tmp_path / "checkpoint", tmp_path / "back", tolerance=1e-4)
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == mixture


@pytest.mark.parametrize(
    ("family", "options", "mixture"),
    [
        ("qwen3", {"granularity": 2}, "qwen3_moe, which computes the same with moe.router.scale 2 in the experts"),
        ("llama", {"layers": frozenset({1})}, "qwen2_moe, which computes the same with attention.bias qkv, of zeros"),
    ],
)
def test_what_is_exported_in_other_terms_is_said_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, options: dict[str, object], mixture: str
) -> None:
    hf = write_hf(tmp_path / "hf", family, family_config(family))
    upcycle(hf, tmp_path / "checkpoint", replace(Upcycling(num_experts=4, top_k=2), **options))  # type: ignore[arg-type]
    assert capsys.readouterr().err == f"note: the mixture is exported as {mixture}\n"
    export_hf(tmp_path / "checkpoint", tmp_path / "back", tolerance=1e-4)
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == mixture.partition(",")[0]


def test_what_cannot_be_exported_is_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = write_hf(tmp_path / "hf", "qwen3", family_config("qwen3"))
    upcycle(hf, tmp_path / "checkpoint", Upcycling(num_experts=6, top_k=3, granularity=3))
    reason = "model.moe.router.scale: 3.0, and qwen3_moe has 1.0"
    note = "note: the mixture can be trained and not exported: no Hugging Face family computes what it does; "
    assert capsys.readouterr().err == f"{note}nearest is qwen3_moe: {reason}\n"
    with pytest.raises(UserError, match=reason):
        export_hf(tmp_path / "checkpoint", tmp_path / "back")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"granularity": 5}, "granularity=5 does not divide the FFN's 48"),
        ({"granularity": 0}, "granularity=0 does not divide"),
        ({"num_experts": 6, "granularity": 4}, "num_experts=6 is no positive multiple of granularity=4"),
        ({"top_k": 3, "granularity": 2}, "top_k=3 is no multiple of granularity=2 up to num_experts=8"),
        ({"top_k": 9}, "top_k=9 is no multiple of granularity=1 up to num_experts=8"),
        ({"layers": frozenset({2})}, "layers=[2]: there are 0 to 1"),
        ({"noise": -0.1}, "noise=-0.1 is no standard deviation"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    hf = write_hf(tmp_path / "hf", "llama", family_config("llama"))
    with pytest.raises(UserError) as raised:
        upcycle(hf, tmp_path / "checkpoint", replace(Upcycling(num_experts=8, top_k=2), **changed))  # type: ignore[arg-type]
    assert message in str(raised.value)
    assert not (tmp_path / "checkpoint").exists()


def test_a_mixture_is_not_upcycled(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "mixtral", family_config("mixtral"))
    with pytest.raises(UserError, match="cannot upcycle: the model has experts already"):
        upcycle(hf, tmp_path / "checkpoint", Upcycling(num_experts=8, top_k=2))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = write_hf(tmp_path / "hf", "llama", family_config("llama"))
    options = f"--hf {hf} --output {tmp_path}/checkpoint --num-experts 8 --top-k 4 --granularity 2 --layers 0-1"
    assert main(["convert", "upcycle", *options.split(), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/checkpoint: ")
    spec = StoredTensors(tmp_path / "checkpoint", PREFIX).specs["layers.1.ffn.experts.up_proj"]
    assert spec == ((8, 24, 32), torch.bfloat16)
    assert main(["convert", "upcycle", *options.replace("0-1", "all").split()]) == 2
    assert "'all' are no layers" in capsys.readouterr().err
