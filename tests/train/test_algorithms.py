"""Algorithms of Composer: one that works on these models goes on after a resume; one that does not is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import UserError, load_recipe
from tests.conftest import QUICKSTART
from tests.train.runs import run_recipe


def test_one_that_freezes_layers_goes_on(tiny_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    frozen = "algorithms={layer_freezing: {freeze_start: 0.25, freeze_level: 0.8}}"
    overrides = tiny_overrides(tmp_path / "run", frozen, "autoresume=true", "save_interval=2ba")
    for batches in (4, 6):
        run = run_recipe(load_recipe(QUICKSTART, [*overrides, f"max_duration={batches}ba"]))
        assert [line["batch"] for line in run.metrics] == [*range(1, batches + 1)]


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("{seq_length_warmup: {duration: 0.5, max_seq_length: 64}}", "RuntimeError: SeqLengthWarmup requires"),
        ("{alibi: {max_sequence_length: 64}}", "IndexError: tuple index out of range"),
    ],
)
def test_one_that_does_not_work_is_named(
    tiny_overrides: Callable[..., list[str]], tmp_path: Path, algorithm: str, said: str
) -> None:
    recipe = load_recipe(QUICKSTART, tiny_overrides(tmp_path / "run", f"algorithms={algorithm}"))
    name = algorithm.strip("{").partition(":")[0]
    with pytest.raises(UserError) as error:
        run_recipe(recipe)
    start = f"algorithms.{name}: Composer's algorithm cannot work on this model: {said}"
    assert str(error.value).startswith(start)
    assert str(error.value).endswith("; leave it out")
