"""A run that is interrupted and resumed on the same mesh is, to the last bit, the run that never was.

The corpus has 6 batches an epoch, so 14 batches cross two ends of an epoch. Losses are compared in hex. No random
number enters this model's training, so generators are compared by what they would draw.
"""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import Recipe
from tests.distributed import RankError, run_distributed
from tests.train.runs import LOSSES, Run, finished, run_recipe

Tiny = Callable[..., Recipe]
STEPS = ("max_duration=14ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1", "eval_interval=5ba")
EVAL = "metrics/eval/LanguageCrossEntropy"
TWO_RANKS = pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2], indirect=True, scope="module"
)
"""And, in the slow set, one."""


@pytest.fixture(scope="module", params=[1, 2], ids="{0} ranks".format)
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def whole(world_size: int, tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that is never interrupted; it keeps a checkpoint of every second batch."""
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("whole"), *STEPS), world_size)


def checkpoint(run: Run, batch: int) -> str:
    return f"load_path={run.run_dir / 'checkpoints' / f'ba{batch}'}"


@TWO_RANKS
def test_resumed_within_an_epoch(tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int) -> None:
    """And, from a checkpoint of the resumed run, once more, within the next epoch."""
    second = run_recipe(tiny_recipe(tmp_path / "second", *STEPS, checkpoint(whole, 4)), world_size)
    third = run_recipe(tiny_recipe(tmp_path / "third", *STEPS, checkpoint(second, 10)), world_size)
    assert second.exact() == whole.exact(5)
    assert third.exact() == whole.exact(11)
    assert list(second.exact()) == list(range(5, 15))
    assert second.column(EVAL) == {batch: loss for batch, loss in whole.column(EVAL).items() if batch > 4}


@pytest.mark.slow
def test_resumed_at_the_end_of_an_epoch(tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int) -> None:
    resumed = run_recipe(tiny_recipe(tmp_path, *STEPS, checkpoint(whole, 6)), world_size)
    assert resumed.exact() == whole.exact(7)
    assert "Warning" not in resumed.err
    assert f"\nresumed from {whole.run_dir}/checkpoints/ba6 (batch 6) in " in resumed.err


def test_a_finished_run_says_so(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "max_duration=2ba", "autoresume=true")
    assert "nothing left" not in run_recipe(recipe).err
    assert run_recipe(recipe).err == "batch 2 of 2ba: nothing left to train\n"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1], indirect=True, scope="module")
def test_resumed_with_loader_processes(tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int) -> None:
    resumed = run_recipe(tiny_recipe(tmp_path, *STEPS, "train_loader.num_workers=1", checkpoint(whole, 4)), world_size)
    assert resumed.exact() == whole.exact(5)


@pytest.mark.parametrize("world_size", [2], indirect=True, scope="module")
def test_resumed_on_fewer_ranks(tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int) -> None:
    """The same samples and, to rounding, the same losses."""
    resumed = run_recipe(tiny_recipe(tmp_path, *STEPS, checkpoint(whole, 4)), world_size - 1)
    for key in (*LOSSES, "grad_norm"):
        expected = {batch: value for batch, value in whole.column(key).items() if batch > 4}
        assert resumed.column(key) == pytest.approx(expected, rel=1e-4), key


@pytest.mark.slow  # elastic resumes are in tests/checkpoint, too
@pytest.mark.parametrize("world_size", [2], indirect=True, scope="module")
def test_resumed_on_a_mesh_that_shares_the_experts(
    tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int
) -> None:
    """And back again, on the first mesh."""
    shared = "mesh={replicate: 1, shard: 2, expert: 2}"
    there = run_recipe(tiny_recipe(tmp_path / "there", *STEPS, shared, checkpoint(whole, 4)), world_size)
    back = run_recipe(tiny_recipe(tmp_path / "back", *STEPS, checkpoint(there, 10)), world_size)
    for run, first in ((there, 5), (back, 11)):
        for key in (*LOSSES, "grad_norm"):
            expected = {batch: value for batch, value in whole.column(key).items() if batch >= first}
            assert run.column(key) == pytest.approx(expected, rel=1e-4), key


def kill_in_batch_9() -> None:
    """The last rank dies as a node does: at once, in the middle of a step."""
    from composer.core import Callback, Event
    from composer.utils import dist

    from moefoundry import build as parts

    class Killer(Callback):
        def run_event(self, event: Event, state, logger) -> None:  # type: ignore[no-untyped-def]
            last = dist.get_global_rank() == dist.get_world_size() - 1
            if event == Event.AFTER_FORWARD and state.timestamp.batch == 8 and last:
                os.kill(os.getpid(), signal.SIGKILL)

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Killer()]


@TWO_RANKS
@pytest.mark.slow
def test_a_killed_run_resumes_by_itself(tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int) -> None:
    recipe = tiny_recipe(tmp_path, *STEPS, "autoresume=true", "save_async=false")  # no save is in flight in batch 9
    with pytest.raises(RankError, match=f"rank {world_size - 1} ended with exit status -9"):
        run_recipe(recipe, world_size, kill_in_batch_9)
    killed = finished(tmp_path)
    assert killed.checkpoints() == ["ba2", "ba4", "ba6", "ba8"]
    assert list(killed.exact()) == list(range(1, 9))

    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "ba8", checkpoints / "ba10.incomplete")  # as if it had died in a save, too
    (checkpoints / "ba10.incomplete" / "state.json").unlink()
    resumed = run_recipe(recipe, world_size)
    assert resumed.exact() == whole.exact()
    assert resumed.checkpoints() == sorted(f"ba{batch}" for batch in range(2, 15, 2)), "nothing incomplete is left"


def without_optimizer_state() -> None:
    from moefoundry.checkpoint import state as module

    module.optimizer_tensors = lambda model, optimizer: {}  # type: ignore[assignment]


def without_data_position() -> None:
    from streaming import StreamingDataset

    StreamingDataset.load_state_dict = lambda self, state: None


@pytest.mark.parametrize("world_size", [1], indirect=True, scope="module")
@pytest.mark.parametrize("broken", [without_optimizer_state, without_data_position])
@pytest.mark.slow
def test_what_is_left_out_shows(
    tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int, broken: Callable[[], None]
) -> None:
    """The comparisons above can fail."""
    resumed = run_recipe(tiny_recipe(tmp_path, *STEPS, checkpoint(whole, 4)), world_size, broken)
    expected = whole.exact(5)
    assert resumed.exact().keys() == expected.keys()
    differing = [batch for batch, values in resumed.exact().items() if values != expected[batch]]
    assert differing in (list(range(5, 15)), list(range(6, 15))), "a batch's own loss precedes its optimizer step"


def draws_of(recipe: Recipe, restore: bool) -> list[tuple[float, float, float, float]]:
    """What this rank's generators give at the start of each batch, while the recipe is trained."""
    import numpy as np
    import torch
    from composer.core import Callback

    from moefoundry import build as parts
    from moefoundry.checkpoint import state as module
    from moefoundry.trainer import train

    draws = []

    class Draw(Callback):
        def batch_start(self, state, logger) -> None:  # type: ignore[no-untyped-def]
            draws.append((torch.rand(()).item(), random.random(), np.random.rand(), np.random.randn()))

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Draw()]
    if not restore:
        module.restore_rng = lambda tensors, rank: None
    train(recipe)
    return draws


@pytest.mark.slow
def test_generators_of_every_rank_are_restored(tiny_recipe: Tiny, tmp_path: Path, world_size: int) -> None:
    """Batch 3 is saved between the two values that NumPy's normal generator makes at once; batch 6 ends an epoch."""
    steps = ("max_duration=8ba", "save_interval=3ba", "save_num_checkpoints_to_keep=-1")
    whole = run_distributed(draws_of, world_size, tiny_recipe(tmp_path / "whole", *steps), True)
    assert len(set(whole[0])) == len(whole[0]) == 8
    assert len({tuple(draws) for draws in whole}) == world_size, "ranks draw different numbers"

    def resumed(batch: int, restore: bool) -> list[list[tuple[float, ...]]]:
        path = f"load_path={tmp_path / 'whole' / 'checkpoints' / f'ba{batch}'}"
        recipe = tiny_recipe(tmp_path / f"{batch}-{restore}", *steps, path)
        return run_distributed(draws_of, world_size, recipe, restore)

    for batch in (3, 6):
        assert resumed(batch, restore=True) == [draws[batch:] for draws in whole]
    for draws, expected in zip(resumed(3, restore=False), whole, strict=True):
        assert draws[0] != expected[3], "the comparison above can fail"
