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
from tests.train.runs import Run, finished, run_recipe

Tiny = Callable[..., Recipe]
FIRST_STEPS = ("max_duration=14ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1", "eval_interval=5ba")
BEGUN, MID_EPOCH, END_OF_EPOCH, SECOND_EPOCH = 2, 4, 6, 8


@pytest.fixture(scope="module", params=[1, 2], ids="{0} ranks".format)
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def whole(world_size: int, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that is never interrupted; it keeps a checkpoint of every second batch."""
    from moefoundry.config import load_recipe
    from tests.conftest import TINY

    run_dir = tmp_path_factory.mktemp("whole")
    overrides = [*TINY, f"run_dir={run_dir}", f"train_loader.dataset.local={tiny_corpus}", *FIRST_STEPS]
    return run_recipe(load_recipe(None, overrides), world_size)


def checkpoint(run: Run, batch: int) -> str:
    return f"load_path={run.run_dir / 'checkpoints' / f'ba{batch}'}"


@pytest.mark.parametrize("batch", [MID_EPOCH, END_OF_EPOCH, SECOND_EPOCH])
def test_a_resumed_run_is_the_same_to_the_bit(
    tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int, batch: int
) -> None:
    resumed = run_recipe(tiny_recipe(tmp_path, *FIRST_STEPS, checkpoint(whole, batch)), world_size)
    assert resumed.exact() == whole.exact(batch + 1)
    assert list(resumed.exact()) == list(range(batch + 1, 15))
    assert resumed.metrics[-1]["metrics/eval/LanguageCrossEntropy"] == (
        whole.metrics[-1]["metrics/eval/LanguageCrossEntropy"]
    )
    assert "Warning" not in resumed.err


def test_a_resumed_run_resumes(tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int) -> None:
    second = run_recipe(tiny_recipe(tmp_path / "2", *FIRST_STEPS, checkpoint(whole, BEGUN)), world_size)
    third = run_recipe(tiny_recipe(tmp_path / "3", *FIRST_STEPS, checkpoint(second, SECOND_EPOCH)), world_size)
    fourth = run_recipe(tiny_recipe(tmp_path / "4", *FIRST_STEPS, checkpoint(third, 12)), world_size)
    assert second.exact() == whole.exact(BEGUN + 1)
    assert third.exact() == whole.exact(SECOND_EPOCH + 1)
    assert fourth.exact() == whole.exact(13)


def test_loader_processes_do_not_change_what_is_read(tiny_recipe: Tiny, tmp_path: Path, whole: Run) -> None:
    if "mesh" not in (whole.run_dir / "config.yaml").read_text():
        pytest.fail("the recipe is gone")
    changes = (*FIRST_STEPS, "train_loader.num_workers=1", "max_duration=8ba", checkpoint(whole, MID_EPOCH))
    resumed = run_recipe(tiny_recipe(tmp_path, *changes, "scheduler.name=constant_with_warmup"))
    tokens = [line["moe/load/layer1"] for line in resumed.metrics]
    assert len(tokens) == 4


def kill_in_batch_9() -> None:
    """The last rank dies as a node does: at once, in the middle of a step."""
    from composer.core import Callback, Event
    from composer.utils import dist

    from moefoundry import train

    class Killer(Callback):
        def run_event(self, event: Event, state, logger) -> None:  # type: ignore[no-untyped-def]
            last = dist.get_global_rank() == dist.get_world_size() - 1
            if event == Event.AFTER_FORWARD and state.timestamp.batch == 8 and last:
                os.kill(os.getpid(), signal.SIGKILL)

    build_callbacks = train.build_callbacks
    train.build_callbacks = lambda *args: [*build_callbacks(*args), Killer()]


def test_a_killed_run_resumes_by_itself(tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int) -> None:
    recipe = tiny_recipe(tmp_path, *FIRST_STEPS, "autoresume=true")
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
    from moefoundry.callbacks import checkpointing

    checkpointing.optimizer_tensors = lambda model, optimizer: {}  # type: ignore[assignment]


def without_data_position() -> None:
    from streaming import StreamingDataset

    StreamingDataset.load_state_dict = lambda self, state: None


@pytest.mark.parametrize("broken", [without_optimizer_state, without_data_position])
def test_what_is_left_out_shows(
    tiny_recipe: Tiny, tmp_path: Path, whole: Run, world_size: int, broken: Callable[[], None]
) -> None:
    """The comparison above can fail."""
    resumed = run_recipe(tiny_recipe(tmp_path, *FIRST_STEPS, checkpoint(whole, MID_EPOCH)), world_size, broken)
    expected = whole.exact(MID_EPOCH + 1)
    assert resumed.exact().keys() == expected.keys()
    differing = [batch for batch, values in resumed.exact().items() if values != expected[batch]]
    assert len(differing) >= len(expected) - 1, "the first batch after a resume does not depend on the optimizer's state"


def draws_of(recipe: Recipe, restore: bool) -> list[tuple[float, float, float, float]]:
    """What this rank's generators give at the start of each batch, while the recipe is trained."""
    import numpy as np
    import torch
    from composer.core import Callback

    from moefoundry import train
    from moefoundry.callbacks import checkpointing

    draws = []

    class Draw(Callback):
        def batch_start(self, state, logger) -> None:  # type: ignore[no-untyped-def]
            draws.append((torch.rand(()).item(), random.random(), np.random.rand(), np.random.randn()))

    build_callbacks = train.build_callbacks
    train.build_callbacks = lambda *args: [*build_callbacks(*args), Draw()]
    if not restore:
        checkpointing.restore_rng = lambda tensors, rank: None
    train.train(recipe)
    return draws


@pytest.mark.parametrize("batch", [3, 6])
def test_generators_of_every_rank_are_restored(tiny_recipe: Tiny, tmp_path: Path, world_size: int, batch: int) -> None:
    """Batch 3 is saved between the two values that NumPy's normal generator makes at once; 6 ends an epoch."""
    steps = ("max_duration=8ba", "save_interval=3ba", "save_num_checkpoints_to_keep=-1")
    whole = run_distributed(draws_of, world_size, tiny_recipe(tmp_path / "whole", *steps), True)
    assert len(set(whole[0])) == len(whole[0]) == 8
    assert len({tuple(draws) for draws in whole}) == world_size, "ranks draw different numbers"
    changes = (*steps, f"load_path={tmp_path / 'whole' / 'checkpoints' / f'ba{batch}'}")
    resumed = run_distributed(draws_of, world_size, tiny_recipe(tmp_path / "resumed", *changes), True)
    assert resumed == [draws[batch:] for draws in whole]
    forgotten = run_distributed(draws_of, world_size, tiny_recipe(tmp_path / "forgotten", *changes), False)
    for draws, expected in zip(forgotten, whole, strict=True):
        assert draws[0] != expected[batch]
