"""Training by stages: what is measured, exact resumption around the borders, and which stages may change."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.checkpoint.run_dir import open_run
from moefoundry.checkpoint.start import data_digests
from moefoundry.config import Recipe, UserError
from tests.distributed import RankError
from tests.train.runs import Run, run_recipe
from tests.train.test_resume import kill_in_batch_9
from tests.train.test_streams import TOKENS, recipe, streams  # noqa: F401

Tiny = Callable[..., Recipe]
STAGES = (
    "curriculum={short: {until: 1536tok, max_seq_len: 32, device_train_microbatch_size: 4, "
    "streams: {code: {proportion: 1}, text: {proportion: 1}}}, "  # 6 batches of 8 x 32
    "small: {until: 10ba, global_train_batch_size: 4}, "
    "last: {streams: {code: {proportion: 0.9}, text: {proportion: 0.1}}}}"
)
SHAPES = {**dict.fromkeys(range(1, 7), (1, 32, 8)), **dict.fromkeys(range(7, 11), (2, 64, 4))}


@pytest.fixture(scope="module")
def staged(recipe: Tiny) -> Tiny:  # noqa: F811
    keys = ("max_duration=5000tok", "scheduler.t_warmup=1000tok", "eval_loader=null", "save_interval=1ba")
    return lambda run_dir, *changes: recipe(run_dir, STAGES, *keys, *changes)


@pytest.fixture(scope="module")
def whole(staged: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(staged(tmp_path_factory.mktemp("whole")), 2)


def checkpoint(run: Run, batch: int) -> str:
    return f"load_path={run.run_dir / 'checkpoints' / f'ba{batch}'}"


def test_metrics_tell_the_stage_and_counts_follow_it(whole: Run) -> None:
    batches = max(whole.column("loss/train/total"))
    for name, index in (("stage", 0), ("max_seq_len", 1), ("global_train_batch_size", 2)):
        expected = {batch: SHAPES.get(batch, (3, 64, 8))[index] for batch in range(1, batches + 1)}
        assert whole.column(f"curriculum/{name}") == expected
    counts = [whole.column(key) for key in TOKENS]
    tokens = {batch: counts[0][batch] + counts[1][batch] for batch in counts[0]}
    positions = 0
    for batch, padding in sorted(whole.column("data/padding").items()):
        _, length, size = SHAPES.get(batch, (3, 64, 8))
        positions += (1 - padding) * length * size
        assert tokens[batch] == pytest.approx(positions)
    assert tokens[batches - 1] < 5000 <= tokens[batches], "max_duration counts tokens"
    assert abs(counts[0][6] - counts[1][6]) < 200, "half and half"
    assert (counts[0][batches] - counts[0][10]) / (tokens[batches] - tokens[10]) == pytest.approx(0.9, abs=0.1)
    lines = [line for line in whole.err.splitlines() if line.startswith("stage ")]
    assert lines == [
        "stage short: batches 1 to 6, 8 x 32 tokens, code 1, text 1",
        "stage small: batches 7 to 10, 4 x 64 tokens",
        "stage last: from batch 11 on, 8 x 64 tokens, code 0.9, text 0.1",
    ]


def test_the_learning_rate_goes_by_the_tokens_that_were_read(whole: Run) -> None:
    rates, counts = whole.column("lr"), [whole.column(key) for key in TOKENS]
    for batch in (2, 3, 4):
        _, length, size = SHAPES[batch]
        before = sum(column[batch - 1] for column in counts)
        assert rates[batch] == pytest.approx(1e-2 * min(1, (before + length * size) / 1000), rel=1e-9)
    assert max(rates.values()) == pytest.approx(1e-2, rel=0.03)
    assert rates[max(rates)] == pytest.approx(1e-3, rel=0.2), "the end of the cosine"


@pytest.mark.parametrize("batch", [5, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (6, 7, 10))])
def test_a_resumed_run_is_the_run_that_never_stopped(staged: Tiny, tmp_path: Path, whole: Run, batch: int) -> None:
    """To every digit, before a border, at it and behind it."""
    workers = f"train_loader.num_workers={batch % 2}"
    resumed = run_recipe(staged(tmp_path, checkpoint(whole, batch), workers, "save_interval=100ba"), 2)
    assert resumed.exact() == whole.exact(batch + 1)
    for key in (*TOKENS, "curriculum/stage", "data/padding"):
        assert resumed.column(key) == {at: value for at, value in whole.column(key).items() if at > batch}


def test_on_another_number_of_ranks_the_batches_are_the_same(staged: Tiny, tmp_path: Path, whole: Run) -> None:
    alone = run_recipe(staged(tmp_path, checkpoint(whole, 4), "save_interval=100ba"), 1)
    for key in (*TOKENS, "data/padding", "curriculum/stage"):
        assert alone.column(key) == {batch: value for batch, value in whole.column(key).items() if batch > 4}
    losses = alone.column("loss/train/lm")
    assert losses == pytest.approx({batch: whole.column("loss/train/lm")[batch] for batch in losses}, rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_by_itself(staged: Tiny, tmp_path: Path, whole: Run) -> None:
    killed = staged(tmp_path, "save_async=false", "autoresume=true", "train_loader.num_workers=1")
    with pytest.raises(RankError, match="rank 1 ended with exit status -9"):
        run_recipe(killed, 2, kill_in_batch_9)
    assert run_recipe(killed, 2).exact() == whole.exact()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("curriculum.last.global_train_batch_size=16", ""),
        ("curriculum.small.until=9ba", ""),
        ("curriculum.small.until=12ba", ""),
        ("curriculum.small.global_train_batch_size=8", "curriculum.small: CHECKPOINT was written with another stage"),
        ("curriculum.short.streams.code.proportion=2", "curriculum.short: CHECKPOINT was written with another stage"),
        ("curriculum.small.until=7ba", "curriculum.small: CHECKPOINT was written with another stage"),
        ("curriculum=null", "curriculum: CHECKPOINT was written with one"),
    ],
)
def test_stages_that_have_begun_stay(staged: Tiny, tmp_path: Path, whole: Run, change: str, named: str) -> None:
    """Batch 8 is the second of the stage ``small``."""
    made = staged(tmp_path / "run", checkpoint(whole, 8), change)
    if not named:
        _, start = open_run(made, data_digests(made))
        assert start is not None
        return
    there = f"{whole.run_dir}/checkpoints/ba8"
    with pytest.raises(UserError, match=rf"^{re.escape(named.replace('CHECKPOINT', there))} for its 8 batches; change"):
        open_run(made, data_digests(made))


def test_a_run_goes_on_with_another_stage_from_where_it_is(staged: Tiny, tmp_path: Path, whole: Run) -> None:
    """The stage that runs is made to end at once."""
    changes = ("curriculum.small.until=8ba", "curriculum.last.max_seq_len=16", "max_duration=10ba")
    options = (checkpoint(whole, 8), *changes, "scheduler.t_warmup=1ba", "save_interval=100ba")
    run = run_recipe(staged(tmp_path, *options), 2)
    assert run.column("curriculum/max_seq_len") == {9: 16, 10: 16}
    assert "stage last: from batch 9 on, 8 x 16 tokens" in run.err
