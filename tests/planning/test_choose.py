"""Searches for a mesh: every result validates, fits, and is what `estimate` says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.config import ConfigError, Recipe, load_recipe
from moefoundry.planning.choose import Choice, choose
from moefoundry.planning.choose_table import choose_table, overrides
from moefoundry.planning.devices import ACCELERATORS, Accelerator, accelerator
from moefoundry.planning.estimate import estimate
from moefoundry.planning.micro_batch import HEADROOM
from tests.conftest import QUICKSTART

WORLD = 8
H100 = accelerator("h100")
WIDE = ["model.d_model=4096", "model.n_layers=4", "model.moe.expert_hidden_size=2048", "global_train_batch_size=64"]
"""Sizes at which the mesh makes a difference of gigabytes."""


def small(memory_gb: float) -> Accelerator:
    """An H100 with less memory."""
    return Accelerator(**{**vars(ACCELERATORS["h100"]), "memory_gb": memory_gb})


def recipe(*changes: str) -> Recipe:
    return load_recipe(QUICKSTART, [*WIDE, *changes])


@pytest.fixture(scope="module")
def found() -> Choice:
    return choose(recipe("precision.compute=bf16"), WORLD, H100)


def test_each_result_validates_and_is_what_estimate_says_of_it(found: Choice) -> None:
    assert found.other_precision is not None
    assert "precision.fp8.recipe" in found.other_precision.changes
    assert len(found.best) == 3
    for each in (*found.best, found.other_precision):
        words = overrides(each).split()
        changed = load_recipe(QUICKSTART, [*WIDE, "precision.compute=bf16", *words], WORLD)
        expected = estimate(changed, WORLD, H100)
        assert each.estimate.to_json() == expected.to_json()


def test_the_fastest_come_first_and_none_is_slower_than_the_recipe(found: Choice) -> None:
    seconds = [each.seconds for each in found.best]
    assert seconds == sorted(seconds)
    assert found.given is not None
    assert found.fits
    assert found.smallest is None
    assert seconds[0] <= found.given.step.total
    assert all(each.same_numbers for each in found.best)
    assert len({each.estimate.plan.mesh for each in found.best}) == 3


def test_the_smallest_change_that_fits_changes_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    given = recipe("precision.compute=bf16", "mesh={replicate: 8, shard: 1}", "device_train_microbatch_size=1")
    whole = estimate(given, WORLD, H100).plan.memory.total / 1e9
    device = small(whole * 0.9 / (1 - HEADROOM))
    choice = choose(given, WORLD, device)
    assert not choice.fits
    assert choice.smallest is not None
    assert len(choice.smallest.changes) <= 2  # replicate and shard go together
    assert choice.smallest.same_numbers
    assert choice.smallest.estimate.plan.memory.total <= whole * 0.9e9
    text = choose_table(choice, WORLD, device)
    assert f"smallest change: {overrides(choice.smallest)}" in text
    assert "as it is, does not fit" in text


def test_bf16_moments_are_tried_only_where_nothing_else_fits() -> None:
    given = recipe("precision.compute=bf16")
    least = choose(given, WORLD, small(0.1)).least
    assert least is not None
    assert least.changes["precision.optimizer_moments"] == "bf16"
    device = small(least.estimate.plan.memory.total * 1.01 / 1e9 / (1 - HEADROOM))
    choice = choose(given, WORLD, device)
    assert choice.best == []
    assert choice.other_precision is not None
    assert not choice.other_precision.same_numbers


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["recommend", str(QUICKSTART), "--world-size"]
    assert main([*command, "3"]) == 1
    told = capsys.readouterr().out
    assert "does not suit this number of devices" in told
    assert "global_train_batch_size" in told
    assert "a world size of 3 fits with: global_train_batch_size=6" in told
    assert main([*command, "4", "--json", "precision.compute=bf16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["tried"] > 20
    (tmp_path / "tiny.yaml").write_text("\n".join(f"{k}: {v}" for k, v in vars(small(0.01)).items()))
    assert main([*command, "4", "--gpu", str(tmp_path / "tiny.yaml")]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_exchanges_in_chunks_are_tried_where_experts_are_divided() -> None:
    given = [*WIDE, "precision.compute=bf16", "model.moe.num_experts=64"]
    fastest = choose(load_recipe(QUICKSTART, given), WORLD, H100).best[0]
    assert fastest.changes["model.moe.dispatch_chunks"] in (2, 4, 8)
    assert fastest.estimate.plan.mesh.expert > 1
    words = [word for word in overrides(fastest).split() if "dispatch_chunks" not in word]
    assert estimate(load_recipe(QUICKSTART, [*given, *words], WORLD), WORLD, H100).step.total > fastest.seconds


def test_gathers_of_once_a_step_are_tried_where_those_of_each_micro_batch_do_not_hide() -> None:
    slow = replace(H100, link_gb_per_s=20.0)
    given = [*WIDE, "precision.compute=bf16"]
    fastest = choose(load_recipe(QUICKSTART, given), WORLD, slow).best[0]
    assert "mesh.gather=each_step" in overrides(fastest)
    words = [word for word in overrides(fastest).split() if not word.startswith(("mesh.gather", "mesh.reduce"))]
    assert estimate(load_recipe(QUICKSTART, [*given, *words], WORLD), WORLD, slow).step.total > fastest.seconds


def test_a_recipe_that_gathers_once_is_told_of_a_plan_without_it_that_fits() -> None:
    least = ["precision.compute=bf16", "activation_checkpointing=full", "device_train_microbatch_size=1"]
    given = recipe(*least, "mesh={replicate: 1, shard: 8, expert: 8, gather: each_step, reduce: each_step}")
    device = small(estimate(given, WORLD, H100).plan.memory.total * 0.9 / 1e9 / (1 - HEADROOM))
    choice = choose(given, WORLD, device, keep_precision=True)
    assert not choice.fits
    assert choice.smallest is not None
    assert {"mesh.gather", "mesh.reduce"} & choice.smallest.changes.keys()


def test_a_curriculum_has_no_single_answer(capsys: pytest.CaptureFixture[str]) -> None:
    staged = "curriculum={short: {until: 10ba, max_seq_len: 128}, long: {}}"
    with pytest.raises(ConfigError, match="curriculum: its stages may each be fastest in another way; ask for one"):
        choose(recipe(staged), WORLD, H100)
    assert main(["recommend", str(QUICKSTART), "--world-size", "8", staged]) == 2
    head, problem = capsys.readouterr().err.splitlines()
    assert head == f"error: {QUICKSTART}: 1 error"
    assert problem.startswith("  curriculum: its stages")
