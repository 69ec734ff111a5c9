"""What is kept, and what is deleted."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.checkpoint.manifest import Manifest, Origin, commit
from moefoundry.checkpoint.store import CheckpointStore, Retention, find_checkpoint, using
from moefoundry.config import ConfigError, Recipe
from tests.train.runs import run_recipe

LOSS = "metrics/eval/LanguageCrossEntropy"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store: CheckpointStore, batch: int, loss: float | None = None) -> None:
    commit(store.begin(batch), Origin(batch, metrics={} if loss is None else {LOSS: loss}), {})
    store.publish(batch)


@pytest.mark.parametrize(("newest", "kept"), [(-1, [2, 4, 6]), (0, [6]), (1, [6]), (2, [4, 6]), (5, [2, 4, 6])])
def test_the_newest(store: CheckpointStore, newest: int, kept: list[int]) -> None:
    for batch in (2, 4, 6):
        save(store, batch)
    store.retain(Retention(newest))
    assert store.batches() == kept


def test_one_of_each_span(store: CheckpointStore) -> None:
    """Saves at multiples of 300 seldom meet a multiple of 1000: the first one at or after it is kept."""
    for batch in range(300, 4201, 300):
        save(store, batch)
        store.retain(Retention(1, every=1000))
    assert store.batches() == [1200, 2100, 3000, 4200]


def test_the_best(store: CheckpointStore) -> None:
    losses = {1: 5.0, 2: 3.0, 3: math.nan, 4: 4.0, 5: None, 6: 3.5}
    for batch, loss in losses.items():
        save(store, batch, loss)
        store.retain(Retention(1, best=LOSS))
    assert store.batches() == [2, 6]
    save(store, 7, 2.0)
    store.retain(Retention(1, best=LOSS))
    assert store.batches() == [7], "the former best is not needed any more"
    save(store, 8)
    store.retain(Retention(1, best="another"))
    assert store.batches() == [8], "where nothing has been measured, nothing is best"


def test_one_in_use_is_not_deleted(store: CheckpointStore) -> None:
    for batch in (1, 2, 3):
        save(store, batch)
    with using(store.path(1)):
        store.retain(Retention(1))
        assert store.batches() == [1, 3]
    store.retain(Retention(1))
    assert store.batches() == [3]


def test_quarantined_ones_are_left_to_a_person(store: CheckpointStore) -> None:
    for batch in (1, 2):
        save(store, batch)
    moved = store.quarantine(1)
    save(store, 3)
    store.retain(Retention(1))
    assert moved.is_dir()
    assert find_checkpoint(str(store.root)) == store.path(3)


def test_a_run_keeps_what_its_recipe_says(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The first step has rate 0 and each one after it ruins the model, so that the first checkpoint stays the best."""
    keys = ("save_num_checkpoints_to_keep=1", "save_keep_every=3ba", f"save_keep_best={LOSS}", "autoresume=true")
    steps = ("save_interval=1ba", "eval_interval=1ba", "optimizer.lr=10")
    run_recipe(tiny_recipe(tmp_path, *keys, *steps, "max_duration=4ba"))
    run = run_recipe(tiny_recipe(tmp_path, *keys, *steps, "max_duration=5ba"))
    losses = run.column(LOSS)
    assert min(losses, key=losses.__getitem__) == 1
    assert run.checkpoints() == ["ba1", "ba3", "ba5"]
    assert Manifest.read(run.run_dir / "checkpoints" / "ba1").origin.metrics == {LOSS: losses[1]}


def test_each_loss_that_may_be_named_is_measured(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_recipe(tmp_path, "save_keep_best=x", "model.mtp.depth=1")
    (problem,) = raised.value.problems
    run = run_recipe(tiny_recipe(tmp_path, "model.mtp.depth=1", "max_duration=2ba", "eval_interval=2ba"))
    assert set(problem.allowed.split(", ")) <= run.metrics[-1].keys()
