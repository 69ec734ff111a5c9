"""Recipes to start from: valid, commented, with the published sizes and balance, and the rules that are stated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.config import ConfigError, load_recipe
from moefoundry.config.yaml_reader import parse_yaml
from moefoundry.conversion.families import FAMILIES, family_for, family_of
from moefoundry.conversion.families.family import computed
from moefoundry.conversion.starting_recipe import Size, batch_sequences, peak_rate, recipe_of_family, with_balance
from moefoundry.planning.describe import count_parameters
from tests.conversion.families.published import PUBLISHED, SAY_THE_SAME

PRETRAIN = Path(__file__).parents[2] / "configs" / "pretrain"


def started(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["init", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_recipe_of_its_published_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(started(capsys, "--family", name))
    recipe = load_recipe(path)
    model = FAMILIES[name].read_config(FAMILIES[name].published[1])
    assert computed(recipe.model) == computed(
        replace(model, attention=replace(model.attention, yarn=None, longrope=None))
    )
    assert FAMILIES[name].fits(recipe.model) == []
    size, counts = Size.of(recipe.model), count_parameters(recipe.model)
    assert (size.total, size.active) == pytest.approx((counts.total, counts.active), rel=1e-3)
    assert main(["validate", str(path), "--world-size", "64"]) == 0
    assert (f"export: {name}\n" in capsys.readouterr().out) != (name in SAY_THE_SAME)


def test_every_value_of_a_recipe_has_a_comment() -> None:
    for family in FAMILIES.values():
        lines = recipe_of_family(family).splitlines()
        assert lines[0].startswith(f"# {family.published[0]} ({family.name}): ")
        assert all(line.endswith(":") or "  # " in line for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_balance_are_as_published(name: str) -> None:
    """The recipes of configs/pretrain have the same, from the reports."""
    family, recipe = family_of(PUBLISHED[name]), load_recipe(PRETRAIN / f"{name}.yaml")
    published = PUBLISHED[name] | ({"aux_loss_alpha": 0.0001} if name == "deepseek-v3-671b" else {})
    balance = with_balance(family, recipe.model, published).moe.balance
    expected = replace(recipe.model.moe.balance, bias_freeze_at=None)
    assert balance.aux_loss_weight == pytest.approx(expected.aux_loss_weight, rel=1e-5)
    assert balance.z_loss_weight == pytest.approx(expected.z_loss_weight)
    assert replace(balance, aux_loss_weight=0, z_loss_weight=0) == replace(expected, aux_loss_weight=0, z_loss_weight=0)
    if name not in (
        "moonlight-16b-a3b",
        "kimi-k2-1026b",
        "deepseek-v2-lite-16b",
        "glm-4.5-air-106b",
        "qwen3.5-397b-a17b",
        "gpt-oss-120b",
    ):  # others of theirs
        model = family.read_config(family.published[1])
        attention = replace(model.attention, yarn=None, longrope=None)
        assert computed(replace(model, attention=attention)) == computed(recipe.model)


def test_the_rules_go_through_what_was_published() -> None:
    assert (peak_rate(1_280_000_000), peak_rate(37_550_000_000)) == (4e-4, 2e-4)
    assert [batch_sequences(active, 4096) for active in (1_280_000_000, 3_350_000_000, 37_000_000_000)] == [
        1024,
        2048,
        4096,
    ]
    assert batch_sequences(1_000, 4096) == 8


@pytest.mark.parametrize(("active", "total"), [("60M", "500M"), ("600M", "3B"), ("3B", "30B"), ("30B", "600B")])
def test_a_recipe_of_a_size(active: str, total: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sized.yaml"
    assert started(capsys, "--active", active, "--total", total, "-o", str(path)).startswith(f"{path}: check it with")
    recipe = load_recipe(path)
    units = {"M": 1e6, "B": 1e9}
    found = Size.of(recipe.model)
    assert found.active == pytest.approx(float(active[:-1]) * units[active[-1]], rel=0.25)
    assert found.total == pytest.approx(float(total[:-1]) * units[total[-1]], rel=0.1)
    assert family_for(recipe.model).name == "qwen3_moe"
    assert recipe.run_name == f"moe-{active}-{total}".lower()


def test_a_recipe_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "My Model").mkdir()
    config = tmp_path / "My Model" / "config.json"
    config.write_text(json.dumps(PUBLISHED["deepseek-v3-671b"]))
    tree = parse_yaml(started(capsys, "--from", str(config.parent)), "recipe.yaml")
    assert (tree["run_name"], tree["max_seq_len"], tree["model"]["d_model"]) == ("My-Model", 4096, 7168)
    assert "yarn" not in tree["model"]["attention"], "an extension comes after pre-training"
    config.write_text(json.dumps(PUBLISHED["deepseek-v3-671b"] | {"hidden_act": "gelu"}))
    assert main(["init", "--from", str(config.parent)]) == 2
    assert "hidden_act: got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--family gpt", "--family: no model family 'gpt'; there are afmoe, bailing_moe"),
        ("--active 1B", "a size is --active N and --total N together"),
        ("--active 1B --total 1B", "--total 1B: with 1.2B active, the least is 2.01B"),
        ("--active 5M --total 1B", "--active 5M: with a vocabulary of 50304 the nearest is"),
        ("--family olmoe -o FILE", "FILE: cannot be written: File exists"),
    ],
)
def test_what_cannot_be_started(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("mine")
    assert main(["init", *arguments.split()]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert Path("FILE").read_text() == "mine"


@pytest.mark.parametrize("command", ["validate", "plan --world-size 1"])
def test_commands_without_a_recipe_say_how_to_get_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert "recipe: none is given; allowed: a YAML file" in err
    assert "moefoundry init writes a recipe to start from; configs/quickstart.yaml is a small one" in err


def test_what_is_missing_is_said_all_at_once_with_what_is_customary() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, ["seed=x", "model.hidden_size=64", "model.n_dense_layers=1"])
    problems = {problem.path: str(problem) for problem in caught.value.problems}
    assert problems["optimizer.lr"] == (
        "optimizer.lr: missing: peak learning rate; customary: 4e-4 for 1B active parameters, 2e-4 for 30B; "
        "a tenth of that to go on with trained weights; allowed: a number > 0"
    )
    assert problems["seed"].startswith("seed: got 'x'")
    assert problems["model.hidden_size"] == "model.hidden_size: unknown key; did you mean 'model.d_model'?"
    assert "model.d_model" not in problems, "it is said under another name"
    assert problems.keys() >= {"run_name", "max_seq_len", "model.vocab_size", "train_loader.dataset.local"}
    assert not {"tokenizer.name", "run_dir", "eval_loader.dataset.local"} & problems.keys(), "they follow from others"
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size: missing: hidden width of the dense FFN; customary"):
        load_recipe(PRETRAIN / "olmoe-1b-7b.yaml", ["model.n_dense_layers=1"])
