"""Models of no family are exported as one that computes the same: the quickstart's, upcycled slices, and others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import ShardValues
from moefoundry.cli.main import main
from moefoundry.config import AttentionBias, ConfigError, ModelConfig, RouterConfig, UserError, load_recipe
from moefoundry.conversion.convert import export_hf, load_hf, write_weights
from moefoundry.conversion.families import FAMILIES, exports_as, holder_of
from moefoundry.conversion.families.equivalents import equivalents
from moefoundry.model.transformer import MoETransformer
from tests.conftest import QUICKSTART
from tests.conversion.families.models import GQA, MLA, QWEN3, experts, sparse
from tests.conversion.hf import contents, family_config
from tests.conversion.transformers5 import randomize, sample

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
SMALL = [
    *("model.vocab_size=61", "model.d_model=32", "model.n_layers=3", "model.ffn_hidden_size=48"),
    *("model.attention={n_heads: 4, n_kv_heads: 2}", "model.moe={num_experts: 8, expert_hidden_size: 20}"),
]
SCALED = RouterConfig(scale=4.0)
CASES = {
    "quickstart": (load_recipe(QUICKSTART, SMALL).model, "qwen2_moe"),
    "scale": (sparse(GQA, SCALED), "mixtral"),
    "scale and norm": (sparse(QWEN3, replace(SCALED, scale=0.5)), "qwen3_moe"),
    "some blocks": (sparse(GQA, SCALED, n_layers=3, dense_layers=[1], ffn_hidden_size=48), "qwen2_moe"),
    "all": (sparse(GQA, SCALED, n_dense_layers=1, ffn_hidden_size=48, moe=experts(SCALED, shared=2)), "qwen2_moe"),
}


def write_model(directory: Path, cfg: ModelConfig) -> MoETransformer:
    """A weights-only checkpoint of a model with random weights, and the model."""
    model = MoETransformer(cfg).eval()
    randomize(model, seed=0)
    state = model.state_dict()
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    directory.mkdir()
    write_weights(directory, cfg, specs, (ShardValues(n, (0,) * t.dim(), t) for n, t in state.items()), 64)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_of_the_export_are_the_same(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """To the last bit here, and in transformers as of any family."""
    cfg, family = CASES[case]
    model = write_model(tmp_path / "checkpoint", cfg)
    export_hf(tmp_path / "checkpoint", tmp_path / "hf", tolerance=1e-5)
    assert f"note: as {exports_as(cfg)}\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == family
    expected = model(sample())
    assert expected.std() > 0.1
    assert torch.equal(load_hf(tmp_path / "hf")(sample()), expected)


def test_what_is_added_is_zero_and_what_is_scaled_is_exact(tmp_path: Path) -> None:
    cfg, _ = CASES["all"]
    model = write_model(tmp_path / "checkpoint", cfg)
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    tensors, layer = contents(tmp_path / "hf"), model.layers[1].ffn
    for name in ("self_attn.q_proj.bias", "mlp.shared_expert_gate.weight"):
        assert not tensors[f"model.layers.1.{name}"].any()
    shared, expert = (tensors[f"model.layers.1.mlp.{name}.down_proj.weight"] for name in ("shared_expert", "experts.3"))
    assert torch.equal(shared, 2 * layer.shared_experts.down_proj.weight)  # type: ignore[union-attr]
    assert torch.equal(expert, 4 * layer.experts.down_proj[3])  # type: ignore[union-attr]


@torch.no_grad()
def test_biases_of_scaled_experts_are_scaled(tmp_path: Path) -> None:
    cfg = family_config("gpt_oss")
    cfg = replace(cfg, moe=replace(cfg.moe, router=replace(cfg.moe.router, scale=4.0)))
    model = write_model(tmp_path / "checkpoint", cfg)
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert torch.equal(load_hf(tmp_path / "hf")(sample()), model(sample()))


def test_the_plainest_model_comes_first() -> None:
    cfg = CASES["all"][0]
    found = list(equivalents(cfg))
    assert found[0].cfg is cfg
    assert [len(same.changes) for same in found] == sorted(len(same.changes) for same in found)
    assert holder_of(sparse(GQA))[1].changes == ()
    assert exports_as(sparse(GQA)) == "mixtral"


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        (sparse(GQA, RouterConfig(scale=3.0)), "model.moe.router.scale: 3.0, and mixtral has 1.0"),
        (sparse(MLA), "model.moe.router.score_function: softmax, and deepseek_v3 has sigmoid"),
    ],
    ids=["no power of two", "another attention"],
)
def test_what_no_family_computes_exactly_is_refused(tmp_path: Path, cfg: ModelConfig, reason: str) -> None:
    write_model(tmp_path / "checkpoint", cfg)
    with pytest.raises(UserError, match=reason):
        export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_family_that_is_asked_for_names_what_stands_in_its_way(tmp_path: Path) -> None:
    write_model(tmp_path / "checkpoint", CASES["quickstart"][0])
    with pytest.raises(ConfigError, match=r"model\.moe\.num_shared_experts: 1, and mixtral has 0"):
        export_hf(tmp_path / "checkpoint", tmp_path / "hf", "mixtral")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf", "qwen2_moe")


def test_the_trained_quickstart_is_exported(capsys: pytest.CaptureFixture[str]) -> None:
    """And the family is named before training."""
    assert main(["validate", str(QUICKSTART)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("export: qwen2_moe, which computes the same with ")
    assert FAMILIES["llama"].fits(load_recipe(QUICKSTART).model)
    assert load_recipe(QUICKSTART).model.attention.bias == AttentionBias.none  # type: ignore[attr-defined]
