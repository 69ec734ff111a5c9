"""The moving average of a run: what its checkpoints hold, resumed, evaluated, and read by the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.cli.main import main
from moefoundry.config import Recipe, load_recipe
from moefoundry.conversion.convert import PREFIX, Weights, load_model
from tests.distributed import run_distributed
from tests.train.runs import Run, run_recipe

DECAY = 0.75
MESH = "mesh={replicate: 1, shard: 2, expert: 2}"
STEPS = (
    "max_duration=4ba",
    "save_interval=1ba",
    "save_num_checkpoints_to_keep=-1",
    "eval_interval=1ba",
    "scheduler={name: constant_with_warmup, t_warmup: 0ba}",  # every step moves the parameters
    "model.moe.router.score_function=sigmoid",
    "model.moe.balance.bias_update_rate=0.01",
    "model.attention={kind: mla, n_heads: 4, q_lora_rank: 12, kv_lora_rank: 16, qk_nope_head_dim: 8,"
    " qk_rope_head_dim: 4, v_head_dim: 8}",
)  # a model of DeepSeek-V3's kind: with a buffer, and a family to export as
AVERAGED = (*STEPS, "save_interval=2ba", "save_async=true", f"ema={{decay: {DECAY}, evaluate: true}}")
EVAL = "metrics/eval/LanguageCrossEntropy"


Deep = Callable[..., Recipe]


@pytest.fixture(scope="module")
def deep_recipe(tiny_overrides: Callable[..., list[str]]) -> Deep:
    """``deep_recipe(run_dir, "key=value", ...)``: the tiny recipe without its attention."""

    def recipe(run_dir: Path, *changes: str) -> Recipe:
        overrides = [text for text in tiny_overrides(run_dir) if not text.startswith("model.attention=")]
        return load_recipe(None, [*overrides, *changes])

    return recipe


@pytest.fixture(scope="module")
def averaged(deep_recipe: Deep, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On two ranks that share the experts. Batch 3 is evaluated, and not saved: a save would drop what FSDP has
    gathered."""
    return run_recipe(deep_recipe(tmp_path_factory.mktemp("averaged"), *AVERAGED, MESH), 2)


@pytest.fixture(scope="module")
def plain(deep_recipe: Deep, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(deep_recipe(tmp_path_factory.mktemp("plain"), *STEPS, MESH), 2)


def checkpoint(run: Run, batch: int) -> Path:
    return run.run_dir / "checkpoints" / f"ba{batch}"


def stored(run: Run, batch: int, prefix: str = "ema/model.") -> dict[str, Tensor]:
    tensors = StoredTensors(checkpoint(run, batch), prefix)
    return {name: tensors.read(name) for name in tensors.specs}


def initial(recipe: Recipe) -> dict[str, Tensor]:
    """The parameters that every mesh begins with."""
    from moefoundry.model.transformer import MoETransformer
    from moefoundry.parallel import materialize

    model = MoETransformer(recipe.model)
    materialize(model, "cpu", recipe.seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_it_is_the_average_of_every_step_and_changes_no_training(
    deep_recipe: Deep, tmp_path: Path, averaged: Run, plain: Run
) -> None:
    assert averaged.exact() == plain.exact()
    expected = {name: value.double() for name, value in initial(deep_recipe(tmp_path, *STEPS)).items()}
    for batch in range(1, 5):
        parameters = stored(plain, batch, PREFIX)
        expected = {name: DECAY * value + (1 - DECAY) * parameters[name] for name, value in expected.items()}
        if batch % 2:
            continue
        average = stored(averaged, batch)
        assert average.keys() == expected.keys(), "buffers are not averaged"
        for name, value in expected.items():
            torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-8)


def test_resumed_it_is_the_same_to_the_last_bit(deep_recipe: Deep, tmp_path: Path, averaged: Run) -> None:
    resumed = run_recipe(deep_recipe(tmp_path, *AVERAGED, MESH, f"load_path={checkpoint(averaged, 2)}"), 2)
    expected, got = stored(averaged, 4), stored(resumed, 4)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert resumed.column(EVAL) == {batch: loss for batch, loss in averaged.column(EVAL).items() if batch > 2}


@pytest.mark.slow
def test_row3_resumed_on_another_mesh_and_back(deep_recipe: Deep, tmp_path: Path, averaged: Run) -> None:
    """Of two ranks, one, and two again. Both resume from what was saved while training, and averaging, went on."""
    changes = (*AVERAGED, "save_interval=1ba")
    there = run_recipe(deep_recipe(tmp_path / "there", *changes, f"load_path={checkpoint(averaged, 2)}"))
    back = run_recipe(deep_recipe(tmp_path / "back", *changes, MESH, f"load_path={checkpoint(there, 3)}"), 2)
    expected = stored(averaged, 4)
    for run in (there, back):
        got = stored(run, 4)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    began = stored(averaged, 2)
    assert any((began[name] - value).abs().max() > 1e-3 for name, value in expected.items()), "it moved meanwhile"


def test_the_index_of_a_checkpoint_is_read_once(deep_recipe: Deep, tmp_path: Path, averaged: Run) -> None:
    recipe = deep_recipe(tmp_path, *AVERAGED, "max_duration=3ba", f"load_path={checkpoint(averaged, 2)}")
    assert run_distributed(reads_of_the_index, 1, recipe) == [1]


def reads_of_the_index(recipe: Recipe) -> int:
    from unittest import mock

    from moefoundry.checkpoint import load
    from moefoundry.trainer import train

    with mock.patch.object(load, "parse_metadata", wraps=load.parse_metadata) as parse:
        train(recipe)
    return parse.call_count


def test_it_begins_with_the_parameters_of_a_run_that_had_none(deep_recipe: Deep, tmp_path: Path, plain: Run) -> None:
    changes = (*AVERAGED, "max_duration=3ba", f"load_path={checkpoint(plain, 2)}")
    resumed = run_recipe(deep_recipe(tmp_path, *changes))
    before, after = stored(plain, 2, PREFIX), stored(resumed, 3, PREFIX)
    for name, value in stored(resumed, 3).items():
        torch.testing.assert_close(value, DECAY * before[name] + (1 - DECAY) * after[name], rtol=1e-5, atol=1e-8)


def test_evaluated_in_place_of_the_parameters(deep_recipe: Deep, tmp_path: Path, averaged: Run, plain: Run) -> None:
    recipe = deep_recipe(tmp_path, *STEPS)
    for run, weights in ((averaged, Weights.ema), (plain, Weights.trained)):
        losses = {batch: run.column(EVAL)[batch] for batch in (2, 4)}
        expected = {batch: held_out_loss(recipe, checkpoint(run, batch), weights) for batch in (2, 4)}
        assert losses == pytest.approx(expected, rel=1e-5)
    assert averaged.column(EVAL) != pytest.approx(plain.column(EVAL), rel=1e-3)


@torch.no_grad()
def held_out_loss(recipe: Recipe, directory: Path, weights: Weights) -> float:
    from moefoundry.data.loader import build_loader

    assert recipe.eval_loader is not None
    model, total, count = load_model(directory, weights), 0.0, 0
    loader = build_loader(recipe.eval_loader, batch_size=4, model_vocab_size=recipe.model.vocab_size, documents_of=None)
    for batch in loader:
        losses = model(batch["input_ids"], batch["labels"])
        total += losses.lm.item() * losses.num_targets.item()
        count += losses.num_targets.item()
    return total / count


def test_commands_read_it(averaged: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Buffers have one value, which goes with either."""
    source, output = str(checkpoint(averaged, 4)), tmp_path / "averaged.safetensors"
    assert main(["convert", "consolidate", "--checkpoint", source, "--output", str(output), "--ema"]) == 0
    got, average, trained = load_file(output), stored(averaged, 4), stored(averaged, 4, PREFIX)
    biases = {name: value for name, value in trained.items() if name.endswith("expert_bias")}
    assert len(biases) == 2
    assert got.keys() == trained.keys()
    assert all(torch.equal(got[name], value) for name, value in (average | biases).items())

    assert main(["convert", "export", "--checkpoint", source, "--hf", str(tmp_path / "hf"), "--verify", "--ema"]) == 0
    head = load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, average["lm_head.weight"])
    assert not torch.equal(head, trained["lm_head.weight"])
    capsys.readouterr()

    generate = ["generate", "--checkpoint", source, "--prompt", "def ", "--max-new-tokens", "8", "--device", "cpu"]
    texts = []
    for options in ([], ["--ema"]):
        assert main([*generate, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("command", ["generate", "export", "consolidate"])
def test_a_checkpoint_without_it_is_named(command: str, plain: Run, tmp_path: Path, capsys) -> None:
    options = {
        "generate": ["generate", "--prompt", "def"],
        "export": ["convert", "export", "--hf", str(tmp_path / "hf")],
        "consolidate": ["convert", "consolidate", "--output", str(tmp_path / "out")],
    }[command]
    assert main([*options, "--checkpoint", str(checkpoint(plain, 4)), "--ema"]) == 2
    message = f"error: {checkpoint(plain, 4)}: the checkpoint holds no moving average; the recipe's key ema keeps one\n"
    assert capsys.readouterr().err == message
    assert not list(tmp_path.iterdir())
