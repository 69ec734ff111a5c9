"""SIGKILL, which no process sees coming: what is lost, and that what is left goes on as if nothing had happened.

Routing is jittered here, so that training depends on the generators of every rank.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moefoundry.callbacks.health import CollectiveError
from moefoundry.checkpoint.run_dir import store_of
from moefoundry.config import Recipe
from tests.distributed import RankError, run_distributed
from tests.train.runs import finished, run_recipe
from tests.train.test_resume import kill_in_batch_9

Tiny = Callable[..., Recipe]
JITTER = "model.moe.router.input_jitter=0.1"
SAVE_INTERVAL = 2
RANKS = 4
SPAN = 5  # batches; each kill has its own span, so that none comes after the end, however fast the machine is


def steps(batches: int) -> list[str]:
    return [JITTER, f"max_duration={batches}ba", f"save_interval={SAVE_INTERVAL}ba", "eval_loader=null"]


def without_generators() -> None:
    """Nothing puts back the state of torch's generator, which the jitter draws from."""
    import torch

    torch.random.set_rng_state = lambda state: None


def test_row1_row2_killed_at_batch_9(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """From the checkpoint of batch 8 on, every bit is that of the run that was not killed, unless generators differ."""
    whole = run_recipe(tiny_recipe(tmp_path / "whole", *steps(10)), 2)
    saved = ["save_async=false", "autoresume=true"]  # in the background, batch 8 might not be there yet
    killed, copy = (tiny_recipe(tmp_path / name, *steps(10), *saved) for name in ("killed", "copy"))
    with pytest.raises(RankError, match="rank 1 ended with exit status -9"):
        run_recipe(killed, 2, kill_in_batch_9)
    assert store_of(tmp_path / "killed").batches()[-1] == 8
    shutil.copytree(tmp_path / "killed", tmp_path / "copy")

    assert run_recipe(killed, 2).exact() == whole.exact()

    without = run_recipe(copy, 2, without_generators).exact(9)
    expected = whole.exact(9)
    assert without.keys() == expected.keys()
    assert all(values != expected[batch] for batch, values in without.items())


def train_and_name_yourself(recipe: Recipe, process_ids: Path) -> None:
    from moefoundry.trainer import train

    rank = os.environ["RANK"]
    (process_ids / f"{rank}.writing").write_text(str(os.getpid()))
    (process_ids / f"{rank}.writing").rename(process_ids / rank)
    train(recipe)


def last_batch(run_dir: Path) -> int:
    """The newest batch that has a complete line."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    complete = [line for line in lines if line.endswith("\n")]
    return json.loads(complete[-1])["batch"] if complete else 0


def lines(run_dir: Path) -> int:
    """How many batches have been trained, those that were lost and trained again included."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@contextmanager
def killed_at_a_random_moment(draw: random.Random, number: int, run_dir: Path, process_ids: Path) -> Iterator[None]:
    """Meanwhile, when the run has reached some batch of its ``number``-th span, one rank is killed: at once or a moment
    later, or, every other time, while a save is under way."""
    rank, in_a_save = draw.randrange(RANKS), number % 2 == 1
    goal = draw.randint(SPAN * number + 1, SPAN * (number + 1))
    seconds = draw.uniform(0.0, 0.02 if in_a_save else 0.1)
    old_lines = lines(run_dir)
    ended = threading.Event()

    def wait_and_kill() -> None:
        while not ended.wait(0.002):
            reached = lines(run_dir) > old_lines and last_batch(run_dir) >= goal
            if reached and (not in_a_save or list((run_dir / "checkpoints").glob("*.incomplete"))):
                time.sleep(seconds)
                os.kill(int((process_ids / str(rank)).read_text()), signal.SIGKILL)
                return

    killer = threading.Thread(target=wait_and_kill)
    killer.start()
    try:
        yield
    finally:
        ended.set()
        killer.join()


@pytest.mark.parametrize(
    ("kills", "batches"),
    [
        pytest.param(1, 6, marks=pytest.mark.slow),
        pytest.param(20, 150, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
    ids=["1 kill", "20 kills"],
)
def test_killed_at_random_moments(tiny_recipe: Tiny, tmp_path: Path, kills: int, batches: int) -> None:
    """Four ranks; every kill loses less than two intervals, and in the end every loss has every bit."""
    draw = random.Random(kills)
    run_dir, process_ids = tmp_path / "killed", tmp_path / "ids"
    process_ids.mkdir()
    recipe = tiny_recipe(run_dir, *steps(batches), "autoresume=true", "save_num_checkpoints_to_keep=2")
    interrupted = 0
    for number in range(kills):
        killed = killed_at_a_random_moment(draw, number, run_dir, process_ids)
        with killed, pytest.raises((RankError, CollectiveError)) as raised:  # of whom the parent hears first
            run_distributed(train_and_name_yourself, RANKS, recipe, process_ids)
        assert "ended with exit status -9" in "".join(raised.value.__notes__)
        saved = store_of(run_dir).batches()
        assert last_batch(run_dir) - (saved[-1] if saved else 0) < 2 * SAVE_INTERVAL
        interrupted += len(list((run_dir / "checkpoints").glob("*.incomplete")))
    assert interrupted >= kills // 10, "saves were hit, too"
    resumed = run_recipe(recipe, RANKS, timeout=300.0)
    whole = run_recipe(tiny_recipe(tmp_path / "whole", *steps(batches)), RANKS, timeout=300.0)
    assert list(whole.exact()) == list(range(1, batches + 1))
    assert resumed.exact() == whole.exact()
    assert finished(run_dir).checkpoints() == [f"ba{batches - SAVE_INTERVAL}", f"ba{batches}"]
