"""Runs that train adapters: what their checkpoints hold; resumed on any mesh, from a base that may have been moved."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.checkpoint.weights import load_model
from moefoundry.cli.main import main
from moefoundry.config import ConfigError, Recipe, UserError
from tests.train.runs import Run, run_recipe

Tiny = Callable[..., Recipe]
LORA = (
    "lora={rank: 4, alpha: 8, dora: true, train_router: false}",
    "max_duration=4ba",
    "save_interval=2ba",
    "save_num_checkpoints_to_keep=-1",
    "model.moe.balance.bias_update_rate=0.01",
    "scheduler={name: constant_with_warmup, t_warmup: 0ba}",
    "ema={decay: 0.5}",
)
MESH = "mesh={replicate: 1, shard: 2, expert: 2}"


@pytest.fixture(scope="module")
def base(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run that trained all weights."""
    biased = "model.moe.balance.bias_update_rate=0.01"
    run = run_recipe(tiny_recipe(tmp_path_factory.mktemp("base"), "max_duration=3ba", biased))
    return run.run_dir / "checkpoints" / "ba3"


@pytest.fixture(scope="module")
def whole(base: Path, tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that is never interrupted, on two ranks that share the experts."""
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("whole"), *LORA, MESH, f"load_path={base}"), 2)


def checkpoint(run: Run, batch: int) -> Path:
    return run.run_dir / "checkpoints" / f"ba{batch}"


def test_a_checkpoint_holds_what_trains(whole: Run, base: Path) -> None:
    specs = StoredTensors(checkpoint(whole, 4)).specs
    kinds = {name.split("/")[0] for name in specs}
    assert kinds == {"model", "optimizer", "ema", "rng"}
    for name in specs:
        assert ".lora." in name or name.startswith("rng/") or name.endswith("expert_bias"), name
    held, in_base = (
        sum(spec.nbytes for name, spec in StoredTensors(path).specs.items() if name.startswith("model/"))
        for path in (checkpoint(whole, 4), base)
    )
    assert held < 0.35 * in_base  # of this tiny model
    assert f"{held // 4 - 8} trained" in whole.err + whole.out  # and two buffers of four


def test_frozen_routers_keep_their_bias(whole: Run, base: Path) -> None:
    before, after = StoredTensors(base), StoredTensors(checkpoint(whole, 4))
    biases = [name for name in before.specs if name.endswith("expert_bias")]
    assert biases
    for name in biases:
        assert before.read(name).abs().max() > 0
        assert torch.equal(before.read(name), after.read(name))


@pytest.mark.slow
def test_resumed_to_the_last_bit(whole: Run, tiny_recipe: Tiny, base: Path, tmp_path: Path) -> None:
    """From its own checkpoint, and the base, which has been moved into a store."""
    shutil.copytree(whole.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "ba4")
    shutil.copytree(base, tmp_path / "moved")
    places = ("autoresume=true", f"load_path={tmp_path / 'gone'}", f"lora.base=file://{tmp_path / 'moved'}")
    resumed = run_recipe(tiny_recipe(tmp_path / "run", *LORA, MESH, *places), 2)
    assert resumed.exact(3) == whole.exact(3)
    last = [StoredTensors(checkpoint(run, 4)) for run in (whole, resumed)]
    for name in last[0].specs:
        assert torch.equal(*(tensors.read(name) for tensors in last)), name


def test_resumed_on_another_mesh(whole: Run, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """On one process, in another run; the base is where the adapters' checkpoint says."""
    resumed = run_recipe(tiny_recipe(tmp_path, *LORA, f"load_path={checkpoint(whole, 2)}"))
    for key in ("loss/train/total", "grad_norm"):
        expected = whole.column(key)
        assert list(resumed.column(key)) == [3, 4]
        for batch, value in resumed.column(key).items():
            assert value == pytest.approx(expected[batch], rel=1e-5)


@pytest.mark.slow
def test_dropout_is_resumed_to_the_last_bit(tiny_recipe: Tiny, base: Path, tmp_path: Path) -> None:
    dropout = (*LORA, "lora.dropout=0.3", "activation_checkpointing=full")
    run = run_recipe(tiny_recipe(tmp_path / "run", *dropout, f"load_path={base}"))
    resumed = run_recipe(tiny_recipe(tmp_path / "resumed", *dropout, f"load_path={checkpoint(run, 2)}"))
    assert resumed.exact() == run.exact(3)


def test_the_model_of_a_checkpoint_has_its_adapters_merged(whole: Run, base: Path) -> None:
    before, after = load_model(base), load_model(checkpoint(whole, 4))
    assert before.state_dict().keys() == after.state_dict().keys()
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in before.state_dict() if any(part in name for part in projections)}
    averaged = load_model(checkpoint(whole, 4), "ema")  # type: ignore[arg-type]
    weight = "layers.1.ffn.experts.gate_proj"
    moved, halfway = ((model.state_dict()[weight] - before.state_dict()[weight]).norm() for model in (after, averaged))
    assert 0 < halfway < moved


@torch.no_grad()
def test_the_whole_way(tiny_recipe: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train all weights, then adapters; export them merged; and transformers writes what we do, and as verified."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family = ("model.n_dense_layers=0", "model.moe.num_shared_experts=0", "max_duration=2ba")
    run_recipe(tiny_recipe(tmp_path / "base", *family))
    lora = ("lora={rank: 4, alpha: 64, use_rslora: true}", f"load_path={tmp_path / 'base'}")
    tuned = run_recipe(tiny_recipe(tmp_path / "tuned", *family, *lora))
    exported = ["-o", str(tmp_path / "exported"), "--merge", "--verify"]
    assert main(["convert", "export", str(tuned.run_dir), *exported]) == 0
    assert "verified" in capsys.readouterr().out
    assert main(["generate", str(tuned.run_dir), "--prompt", "def first", "--max-new-tokens", "8"]) == 0
    text = capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    tokens = theirs.generate(**tokenizer("def first", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(tokens[0]).strip() == text.strip()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["lora=null", "ema=null"], "has adapters alone; merge them into their base first"),
        (["lora.rank=8"], "lora.rank: 4 there, 8 here"),
        (["lora.use_rslora=true"], "lora.use_rslora: false there, true here"),
        (["lora.base={other}"], "is not the base that the adapters were trained on"),
        (["lora.base={whole}"], "has adapters alone; merge them first: moefoundry convert merge"),
        (["lora.base={gone}"], "no complete checkpoint at"),
        (["load_path={base}", "lora.base={base}"], "has whole weights; leave one of them out"),
    ],
)
def test_what_does_not_fit_is_refused(
    whole: Run, base: Path, other: Path, tiny_recipe: Tiny, tmp_path: Path, changes: list[str], words: str
) -> None:
    from moefoundry.checkpoint.run_dir import open_run

    places = {"base": base, "other": other, "whole": checkpoint(whole, 2), "gone": tmp_path / "gone"}
    changes = [change.format(**places) for change in changes] if "{" in changes[-1] else changes
    recipe = tiny_recipe(tmp_path, *LORA, f"load_path={checkpoint(whole, 2)}", *changes)
    with pytest.raises(UserError) as error:
        open_run(recipe, {})
    assert words in str(error.value)
    assert "\n" not in str(error.value).split("architecture:")[0]


@pytest.fixture(scope="module")
def other(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same architecture with other weights."""
    from moefoundry.conversion.convert import write_weights

    recipe = tiny_recipe(tmp_path_factory.mktemp("unused"), "model.moe.balance.bias_update_rate=0.01")
    directory = tmp_path_factory.mktemp("other")
    write_random(directory, recipe, write_weights)
    return directory


def write_random(directory: Path, recipe: Recipe, write_weights: Callable[..., None]) -> None:
    from moefoundry.checkpoint.format import TensorSpec
    from moefoundry.checkpoint.out_of_core import ShardValues
    from moefoundry.model.transformer import MoETransformer
    from moefoundry.parallel import materialize

    model = MoETransformer(recipe.model)
    materialize(model, "cpu", 99)
    tensors = model.state_dict()
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    shards = [ShardValues(name, (0,) * tensor.dim(), tensor) for name, tensor in tensors.items()]
    write_weights(directory, recipe.model, specs, shards, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "lora.base: adapters are trained on top of trained weights"),
        (["load_path=x", "lora.rank=6"], "lora.rank: the grouped_mm backend needs rows of whole 16 bytes"),
        (["load_path=x", "lora.rank=4", "precision.compute=bf16"], "allowed: multiples of 8"),
        (["load_path=x", "model.moe.backend=triton"], "triton computes an expert in one piece"),
        (["load_path=x", "lora.targets=[]"], "lora.targets: an empty list adapts nothing"),
        (["load_path=x", "lora.targets=[experts, q_proj]"], "lora.targets[1]"),
    ],
)
def test_recipes_that_cannot_be_trained(tiny_recipe: Tiny, tmp_path: Path, changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_recipe(tmp_path, "lora={rank: 8}", *changes)
    assert words in str(error.value)
