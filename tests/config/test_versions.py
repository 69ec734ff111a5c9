"""The format version of recipes: what a stored recipe of an earlier one means, and that none is guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import ConfigError, Recipe, dump_recipe, flatten, load_recipe
from moefoundry.config.build import Builder
from moefoundry.config.spec import every_key, is_free_on_resume, plain
from moefoundry.config.versions import ADDED, FORMAT_VERSION, upgraded, without_effect
from tests.conftest import QUICK

FIRST = json.loads(Path(__file__).with_name("first_recipe.json").read_text(encoding="utf-8"))
"""The recipe of a checkpoint that the first release wrote."""
OF_LATENT_ATTENTION = {f"model.attention.indexer{key}" for key in ("", ".stage", ".loss_weight")}
BESIDE = {key: value for tables in ADDED.values() for keys in tables.values() for key, value in keys.items()}


def problems_of(recipe: dict[str, Any]) -> list[str]:
    tree: dict[str, Any] = {}
    for key, value in recipe.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    builder = Builder()
    builder.build(type(load_recipe(None, QUICK).model), tree["model"], "model")
    return [problem.path for problem in builder.problems]


def test_a_recipe_of_the_first_version_means_what_it_meant() -> None:
    now = upgraded(FIRST)
    assert now.items() >= FIRST.items(), "what it says stays"
    absent = (*OF_LATENT_ATTENTION, "model.attention.yarn.attention_factor", "model.attention.yarn.truncate")
    added = {key: value for key, value in BESIDE.items() if key not in absent}
    assert {key: now[key] for key in now.keys() - FIRST.keys()} == {"format_version": FORMAT_VERSION, **added}
    assert problems_of(now) == []
    assert upgraded(now) == now


def test_no_other_key_that_matters_was_added_without_a_version() -> None:
    """A key that later recipes have and the first had not is in ``ADDED``, is free on resume, or comes with a mapping
    that was null."""
    attention = ("yarn.", "llama3_rope.", "kv_", "q", "v_", "indexer.", "longrope.")
    data = (f"{loader}.dataset.{name}." for loader in ("train_loader", "eval_loader") for name in ("fim", "streams"))
    linear = "model.linear_attention."
    new_mappings = (
        "dpo.",
        "ema.",
        "lora.",
        "losses.",
        linear,
        "optimizer.momentum",  # of an optimizer that was not there
        *(f"model.moe.router.{name}" for name in ("margin", "sampled")),  # of a score function that was not there
        *(f"model.attention.{name}" for name in attention),
        *data,
    )
    known = {path for path, spec in every_key().items() if not spec.is_mapping}
    added = {key for key in known - FIRST.keys() if not is_free_on_resume(key) and not key.startswith(new_mappings)}
    assert added <= BESIDE.keys()


@pytest.mark.parametrize("key", ["model.d_model", "model.moe.router.score_function", "model.attention.rope_theta"])
def test_what_no_version_lacks_is_never_guessed(key: str) -> None:
    assert key in problems_of({name: value for name, value in upgraded(FIRST).items() if name != key})


def test_yarn_is_not_turned_off_where_it_is_on() -> None:
    on = {f"model.attention.yarn.{name}": 4 for name in ("factor", "original_max_seq_len")}
    now = upgraded({"model.attention.n_heads": 4, **on})
    assert "model.attention.yarn" not in now
    assert (now["model.attention.yarn.truncate"], now["model.attention.yarn.attention_factor"]) == (True, None)


def test_a_stored_recipe_and_a_file_of_the_present(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        dump_recipe(load_recipe(None, QUICK))
        .replace(f"format_version: {FORMAT_VERSION}\n", "")
        .replace("  timing: batch_end\n", "")
    )
    assert load_recipe(path, stored=True).scheduler.timing == "composer"
    assert load_recipe(path).scheduler.timing == "batch_end"
    path.write_text("format_version: 1\n" + path.read_text())
    assert load_recipe(path).scheduler.timing == "composer"
    assert load_recipe(path).format_version == FORMAT_VERSION


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "x", None])
def test_other_versions_are_refused(version: Any) -> None:
    with pytest.raises(ConfigError, match="format_version"):
        load_recipe(None, [*QUICK, f"format_version={json.dumps(version)}"])
    with pytest.raises(ValueError, match=f"this release reads 1 to {FORMAT_VERSION}"):
        upgraded({"format_version": version})


def test_keys_that_no_layer_reads() -> None:
    sizes = {"model.n_layers": 3, "model.n_dense_layers": 0, "model.dense_layers": [], "model.mtp.depth": 0}
    assert without_effect(sizes) == ("model.ffn_hidden_size",)
    assert without_effect({**sizes, "model.dense_layers": [1]}) == ()
    assert without_effect({**sizes, "model.n_dense_layers": 2, "model.dense_layers": [2]}) == ("model.moe.",)
    assert without_effect({**sizes, "model.n_dense_layers": 3, "model.mtp.depth": 1}) == ()


def test_a_recipe_says_its_version() -> None:
    assert plain(Recipe())["format_version"] == flatten(load_recipe(None, QUICK))["format_version"] == FORMAT_VERSION
