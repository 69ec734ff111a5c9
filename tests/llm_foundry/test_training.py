"""Recipes of LLM Foundry train by our command with the losses of LLM Foundry itself, on one rank and on two."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moefoundry.checkpoint.weights import load_model
from moefoundry.migration.import_foreign import import_foreign
from tests.distributed import captured_output, run_distributed
from tests.llm_foundry import recipes
from tests.llm_foundry.moving import Moved, exact, lay_out, walk
from tests.test_extending import install

Losses = dict[str, list[float]]
POINTS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
SECRET, TOKEN = "planted-and-plain", "hf_" + "a" * 34


class Outcome(NamedTuple):
    """Result of a command: exit status, losses by name, standard output and standard error."""

    status: int
    losses: Losses
    out: str
    err: str


def losses_of(trainer: Any) -> Losses:
    data = trainer.logger.destinations[0].data
    return {
        name.removeprefix("loss/train/"): [float(value) for _, value in values]
        for name, values in data.items()
        if name.startswith("loss/train/")
    }


def by_llm_foundry(trees: dict[str, dict[str, Any]]) -> dict[str, Losses]:
    """Train by LLM Foundry alone, from recipes that a person has made fit for this machine."""
    from llmfoundry.command_utils import train
    from omegaconf import OmegaConf

    return {name: losses_of(train(OmegaConf.create(tree))) for name, tree in trees.items()}


def all_of_one_rank(
    trees: dict[str, dict[str, Any]], site: Path, commands: dict[str, list[str]], directory: Path
) -> tuple[dict[str, Losses], dict[str, Outcome], Moved]:
    """One after the other: the imports take long."""
    return by_llm_foundry(trees), by_command(site, commands), walk(directory)


def by_command(site: Path, commands: dict[str, list[str]]) -> dict[str, Outcome]:
    """Give ``moefoundry train`` each list of arguments."""
    sys.path.insert(0, str(site))
    catalogue: Any = import_module("catalogue")  # LLM Foundry's registries; the ranks' server has imported it
    catalogue.AVAILABLE_ENTRY_POINTS = entry_points()  # as in a process that began after the installation
    os.environ["WANDB_MODE"] = "offline"
    from moefoundry.cli.main import main
    from moefoundry.llm_foundry import run as module

    trainers: list[Any] = []
    plain = module.run
    module.run = lambda *args: trainers.append(plain(*args))  # type: ignore[assignment,return-value]
    outcomes = {}
    for name, arguments in commands.items():
        trainers.clear()
        sys.argv = ["scripts/train.py", *arguments]
        with captured_output() as texts:
            status = main(["train", *arguments])
        outcomes[name] = Outcome(status, losses_of(trainers[0]) if trainers else {}, *texts)
    return outcomes


def fit_by_hand(tree: dict[str, Any]) -> dict[str, Any]:
    """The same training on a CPU, as LLM Foundry's own documentation has it."""
    tree = tree | {"precision": "fp32", "fsdp_config": None}
    tree["model"] = tree["model"] | {"init_device": "cpu"}
    if tree["model"]["name"] == "mpt_causal_lm":
        tree["model"] |= {"attn_config": {"attn_impl": "torch"}, "loss_fn": "torch_crossentropy"}
    for loader in ("train_loader", "eval_loader"):
        tree[loader] = tree[loader] | {"prefetch_factor": None, "persistent_workers": False}
    return tree


@pytest.fixture(scope="module")
def trees(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    models = {
        "mpt": recipes.mpt(),
        "torch_dmoe": recipes.mpt(no_bias=True, ffn_config=recipes.TORCH_DMOE),
        "gpt2": recipes.gpt2(tmp_path_factory.mktemp("gpt2")),
    }
    faster = {"device_train_microbatch_size": 2, "max_duration": "5ba"}
    return {name: recipes.recipe(model, tiny_corpus, **faster) for name, model in models.items()}


@pytest.fixture(scope="module")
def ours(tiny_corpus: Path) -> dict[str, Any]:
    """Micro-batches of one sequence: their balance losses are those of the same tokens on any number of ranks."""
    return recipes.recipe(recipes.mpt(ffn_config=recipes.OURS), tiny_corpus, eval_loader=None, max_duration="8ba")


@pytest.fixture(scope="module")
def commands(
    trees: dict[str, dict[str, Any]], ours: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("recipes")
    every = trees | {"ours": ours}
    return {name: [recipes.write(directory, tree, f"{name}.yaml")] for name, tree in every.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    install(directory, "declared", POINTS, {})
    return directory


@pytest.fixture(scope="module")
def bad(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    code = tmp_path_factory.mktemp("code") / "code.py"
    code.write_text("raise SystemExit(3)")
    recipe = commands["mpt"][0]
    return {
        "optimizer: ": [recipe, "optimizer.name=adam_of_nobody"],
        "optimizer:  ": [recipe, "optimizer.momentm=0.9"],
        "callbacks.of_nobody: ": [recipe, "callbacks.of_nobody={}"],
        "train_loader: ": [recipe, "train_loader.dataset.local=nowhere/at_all"],
        "tokenizer: ": [recipe, "tokenizer.name=/nowhere/at_all"],
        "model: ": [recipe, "model.n_heads=5"],
        "scheduler: ": [recipe, "scheduler.t_warmup=2weeks"],
        "model.ffn_config.top_kk: unknown key": [commands["ours"][0], "model.ffn_config.top_kk=2"],
        "model.ffn_config.balance.bias_update_rate: ": [
            commands["ours"][0],
            "model.ffn_config.balance={bias_update_rate: 0.1}",
        ],
        "model.ffn_config.moe_world_size: ": [recipe, "model.ffn_config={ffn_type: mb_dmoe, moe_world_size: 2}"],
        f"code_paths: would run the code of {code}": [recipe, f"code_paths=[{code}]"],
    }


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run leaves its files."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def on_one_rank(
    trees: dict[str, dict[str, Any]],
    site: Path,
    commands: dict[str, list[str]],
    bad: dict[str, list[str]],
    kept: Path,
    tiny_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Losses], dict[str, Outcome], Moved]:
    secrets = [f"variables.api_key={SECRET}", f"metadata.note={TOKEN}", "log_config=true", "max_duration=1ba"]
    secrets += [f"save_folder={kept}/checkpoints", f"loggers.wandb.init_kwargs.dir={kept}"]
    secrets += [f"loggers.tensorboard.log_dir={kept}/tensorboard", f"loggers.mlflow.tracking_uri=file://{kept}/mlruns"]
    told = {"ours": commands["ours"], "secrets": [*commands["mpt"], *secrets]}
    fit = {name: fit_by_hand(tree) for name, tree in trees.items()}
    lay_out(directory := tmp_path_factory.mktemp("moving"), tiny_corpus)
    return run_distributed(all_of_one_rank, 1, fit, site, told | bad, directory, timeout=120)[0]


@pytest.fixture(scope="module")
def on_one(on_one_rank: tuple[dict[str, Losses], dict[str, Outcome], Moved]) -> dict[str, Outcome]:
    return on_one_rank[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def on_two(site: Path, commands: dict[str, list[str]], tiny_corpus: Path, shards: Path) -> list[dict[str, Outcome]]:
    changes = {
        "max_duration": "1ba",
        "save_folder": str(shards / "saved"),
        "fsdp_config": {"state_dict_type": "sharded"},
    }
    saved = recipes.write(shards, recipes.recipe(exact(), tiny_corpus, eval_loader=None, **changes))
    return run_distributed(by_command, 2, site, commands | {"saved": [saved]}, timeout=120)


def test_losses_are_those_of_llm_foundry(
    on_one_rank: tuple[dict[str, Losses], dict[str, Outcome], Moved], on_two: list[dict[str, Outcome]]
) -> None:
    for name, losses in on_one_rank[0].items():
        first, second = (outcomes[name] for outcomes in on_two)
        assert (first.status, second.status) == (0, 0), first.err
        assert len(losses["total"]) == 5
        assert losses["total"][-1] < losses["total"][0]
        assert first.losses["total"] == pytest.approx(losses["total"], rel=1e-4)
        assert first.err.count("note: precision: 'amp_bf16' becomes 'fp32'") == 1
        assert "note: fsdp_config.sharding_strategy: 'FULL_SHARD' is dropped" in first.err
        assert "note: " not in second.err


def test_our_moe_has_equal_losses_on_one_and_two_ranks(
    on_one: dict[str, Outcome], on_two: list[dict[str, Outcome]]
) -> None:
    one, two = on_one["ours"], on_two[0]["ours"]
    assert (one.status, two.status) == (0, 0), one.err + two.err
    assert set(one.losses) == {"total", "loss", "balance", "z"}
    for name, values in one.losses.items():
        assert len(values) == 8
        assert two.losses[name] == pytest.approx(values, rel=1e-4)
    assert min(one.losses["balance"]) > 0
    assert one.losses["total"][-1] < one.losses["total"][0]


def test_moving_in_an_afternoon(on_one_rank: tuple[dict[str, Losses], dict[str, Outcome], Moved]) -> None:
    """The page's commands, and weights that give LLM Foundry's logits."""
    moved = on_one_rank[2]
    assert moved.failures == {}
    assert moved.logits_difference < 1e-5
    assert "model.ffn_config.moe_num_experts: 4 -> model.moe.num_experts: 4" in moved.report


def test_shards_of_two_ranks_are_imported(on_two: list[dict[str, Outcome]], shards: Path) -> None:
    assert on_two[0]["saved"].status == 0, on_two[0]["saved"].err
    saved = next(path.parent for path in shards.glob("saved/*/.metadata"))
    summary = import_foreign(saved, shards / "out", recipe=shards / "recipe.yaml")
    model = load_model(summary.path)
    assert model.layers[1].ffn.experts.gate_proj.shape == (4, 64, 32)
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.slow  # four processes, each of which imports LLM Foundry
def test_our_moe_has_equal_losses_on_four_ranks(
    site: Path, commands: dict[str, list[str]], on_one: dict[str, Outcome]
) -> None:
    four = run_distributed(by_command, 4, site, {"ours": commands["ours"]}, timeout=240)[0]["ours"]
    assert four.status == 0, four.err
    for name, values in on_one["ours"].losses.items():
        assert four.losses[name] == pytest.approx(values, rel=1e-4)


def test_errors_are_one_line_that_names_the_key(on_one: dict[str, Outcome], bad: dict[str, list[str]]) -> None:
    for begin in bad:
        outcome = on_one[begin]
        lines = [line for line in outcome.err.splitlines() if line.startswith("error: ") or line.startswith("  ")]
        assert outcome.status == 2, outcome
        assert any(begin.strip() in line for line in lines), outcome.err
        assert "Traceback" not in outcome.err
        assert not outcome.losses


def test_secrets_are_neither_printed_nor_kept(on_one: dict[str, Outcome], kept: Path) -> None:
    told = on_one["secrets"]
    assert told.status == 0, told.err
    assert "max_duration: 1ba" in told.out
    assert "api_key: (secret)" in told.out
    assert SECRET not in told.out + told.err
    assert TOKEN not in told.out + told.err
    files = {str(path): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    for place in ("/checkpoints/", ".wandb", "events.out", "/mlruns/"):
        assert any(place in path for path in files), place
    assert [path for path, content in files.items() if SECRET.encode() in content or TOKEN.encode() in content] == []
