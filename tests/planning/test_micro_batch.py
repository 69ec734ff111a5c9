"""Micro-batches that are chosen from the plan of memory: the largest that fits, for each stage that leaves it open."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.config import Auto, Recipe, load_recipe
from moefoundry.config.curriculum import stages_of
from moefoundry.planning import this_device
from moefoundry.planning.choose import choose
from moefoundry.planning.devices import accelerator
from moefoundry.planning.micro_batch import HEADROOM, divisions, fitted, left_open, with_sizes
from moefoundry.planning.plan import make_plan, micro_batches
from tests.conftest import QUICKSTART

KEY = "device_train_microbatch_size"
AUTO = f"{KEY}=auto"
WIDE = ("model.d_model=2048", "model.moe.expert_hidden_size=1024", "max_seq_len=2048", "global_train_batch_size=96")


def recipe(*changes: str) -> Recipe:
    return load_recipe(QUICKSTART, [*WIDE, *changes])


def total(size: int, *changes: str) -> int:
    return make_plan(recipe(f"{KEY}={size}", *changes), 8).memory.total


def test_divisions_are_as_even_as_possible() -> None:
    assert divisions(12) == [12, 6, 4, 3, 2, 1]
    assert divisions(7) == [7, 4, 3, 2, 1]
    assert divisions(1) == [1]
    for size in divisions(12):
        batch = replace(recipe(), global_train_batch_size=12, device_train_microbatch_size=size)
        assert max(micro_batches(batch, 1)) - min(micro_batches(batch, 1)) <= size - 1


@pytest.mark.parametrize("wanted", [12, 6, 4, 1])
def test_the_largest_that_fits_is_taken(wanted: int) -> None:
    memory_gb = total(wanted) * 1.0001 / 1e9 / (1 - HEADROOM)
    chosen = fitted(recipe(AUTO), 8, 8, memory_gb)
    assert chosen == recipe(f"{KEY}={wanted}")


def test_one_is_taken_where_nothing_fits_and_a_number_stays() -> None:
    assert fitted(recipe(AUTO), 8, 8, 0.1).device_train_microbatch_size == 1
    own = recipe(f"{KEY}=3")
    assert fitted(own, 8, 8, 0.1) is own


def test_stages_of_a_curriculum_have_a_size_each() -> None:
    stages = f"curriculum={{short: {{until: 10ba, max_seq_len: 512}}, own: {{until: 20ba, {KEY}: 5}}, long: {{}}}}"
    open_recipe = recipe(AUTO, stages)
    assert [stage.name for stage in left_open(open_recipe)] == ["short", "long"]
    memory_gb = total(4) * 1.0001 / 1e9 / (1 - HEADROOM)
    chosen = fitted(open_recipe, 8, 8, memory_gb)
    assert [stage.microbatch_size for stage in stages_of(chosen)] == [12, 5, 4]
    assert not left_open(chosen)
    assert chosen.device_train_microbatch_size == 4, "no stage reads it"


def test_it_is_written_and_read_as_a_word(tmp_path: Path) -> None:
    from moefoundry.config import dump_recipe, flatten

    (tmp_path / "config.yaml").write_text(dump_recipe(recipe(AUTO)))
    again = load_recipe(tmp_path / "config.yaml", stored=True)
    assert again == recipe(AUTO)
    assert again.device_train_microbatch_size is Auto.auto
    assert flatten(again)[KEY] == "auto"
    assert with_sizes(again, {"": 4}) == recipe(f"{KEY}=4")


def test_commands_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    wide = [str(QUICKSTART), *WIDE]
    for command in (["plan", "--memory-gb", "20"], ["estimate"]):
        assert main([*command, *wide, AUTO, "--world-size", "8", "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["memory"]["total"] <= values["memory"]["limit"] * (1 - HEADROOM)
        assert values["tokens_per_micro_batch"] > 2048
    assert main(["validate", *wide, AUTO]) == 0
    choice = choose(recipe(AUTO), 8, accelerator("h100"), keep_precision=True)
    assert choice.given is not None
    assert choice.fits
    assert choice.given.plan.tokens_per_micro_batch == 12 * 2048


def test_memory_of_a_host_is_shared_by_its_ranks_and_limited_by_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    here = torch.device("cpu")
    monkeypatch.setattr(this_device, "CGROUP", tmp_path)
    free = this_device.device_memory(here, 1)
    assert this_device.device_memory(here, 4) == pytest.approx(free / 4, rel=0.2)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert this_device.device_memory(here, 2) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert this_device.device_memory(here, 1) > 1e6
