"""Stages of a curriculum: where they begin, and what is refused."""

import pytest

from moefoundry.config import ConfigError, Recipe, flatten, load_recipe
from moefoundry.config.curriculum import batches_until, described_stages, past_of, stage_at, stages_of, stages_of_flat
from tests.conftest import QUICK

STREAMS = "train_loader.dataset.streams={code: {local: a}, text: {local: b}}"
STAGES = (
    "curriculum={short: {until: 100001tok, max_seq_len: 256, device_train_microbatch_size: 4}, "
    "more: {until: 120ba, global_train_batch_size: 8, streams: {code: {proportion: 3}, text: {proportion: 1}}}, "
    "most: {until: 400000tok, global_train_batch_size: 16}, last: {}}"
)


def recipe(*changes: str) -> Recipe:
    return load_recipe(None, [*QUICK, STREAMS, STAGES, *changes])


def test_where_stages_begin() -> None:
    stages = stages_of(recipe())
    assert [(stage.name, stage.first, stage.end) for stage in stages] == [
        ("short", 0, 98),  # 97 batches of 4 x 256 tokens are fewer than 100,001
        ("more", 98, 120),  # 22 of 8 x 512
        ("most", 120, 146),  # 100,352 + 90,112 tokens so far; 26 of 16 x 512 more reach 400,000
        ("last", 146, None),
    ]
    sizes = [(stage.batch_size, stage.seq_len, stage.microbatch_size) for stage in stages]
    assert sizes == [(4, 256, 4), (8, 512, 1), (16, 512, 1), (4, 512, 1)]
    assert [stage.proportions for stage in stages] == [None, (("code", 3.0), ("text", 1.0)), None, None]
    assert [stage_at(stages, batch).name for batch in (-1, 0, 97, 98, 119, 120, 145, 146, 10**9)] == [
        *("short", "short", "short", "more", "more", "most", "most", "last", "last"),
    ]
    for duration, counts in {
        "100ba": [98, 2, 0, 0],
        "147ba": [98, 22, 26, 1],
        "100352tok": [98, 0, 0, 0],
        "100353tok": [98, 1, 0, 0],
        f"{100352 + 90112 + 26 * 8192 + 2049}tok": [98, 22, 26, 2],
        "401sp": [98, 2, 0, 0],
        "0ba": [0, 0, 0, 0],
    }.items():
        assert batches_until(stages, duration) == counts, duration
    assert batches_until(stages, "2ep") is None
    (only,) = stages_of(recipe("curriculum=null"))
    assert (only.first, only.end, only.batch_size, only.seq_len) == (0, None, 4, 512)


def test_stages_are_described_as_far_as_the_run_goes() -> None:
    assert described_stages(recipe("max_duration=110ba")) == [
        "stage short: batches 1 to 98, 4 x 256 tokens",
        "stage more: batches 99 to 110, 8 x 512 tokens, code 3, text 1",
        "stage most: not reached; it would begin with batch 121, and the run ends before",
        "stage last: not reached; it would begin with batch 147, and the run ends before",
    ]
    assert described_stages(recipe("max_duration=147ba"))[2:] == [
        "stage most: batches 121 to 146, 16 x 512 tokens",
        "stage last: from batch 147 on, 4 x 512 tokens",
    ]
    assert described_stages(recipe("curriculum=null", "max_duration=110ba")) == []


def test_a_flat_recipe_has_the_same_stages() -> None:
    made = recipe()
    assert stages_of_flat(flatten(made)) == stages_of(made)
    assert stages_of_flat(flatten(recipe("curriculum=null"))) == stages_of(recipe("curriculum=null"))


@pytest.mark.parametrize(
    ("change", "first_other_batch"),
    [
        ("curriculum.short.max_seq_len=240", 0),
        ("curriculum.short.device_train_microbatch_size=1", None),
        ("curriculum.short.until=99ba", 98),
        ("curriculum.short.until=50ba", 50),
        ("curriculum.more.streams.code.proportion=1", 98),
        ("curriculum.more.until=130ba", 120),
        ("curriculum.last.global_train_batch_size=32", 146),
        ("curriculum.last={until: 150ba}", None),
    ],
)
def test_the_past_is_what_has_decided_the_batches_so_far(change: str, first_other_batch: int | None) -> None:
    changes = [change, *(["curriculum.end={}"] if first_other_batch is None and "until" in change else [])]
    one, other = stages_of(recipe()), stages_of(recipe(*changes))
    end = 148 if first_other_batch is None else first_other_batch
    for batches in range(end + 1):
        assert past_of(one, batches) == past_of(other, batches), batches
    if first_other_batch is not None:
        assert past_of(one, end + 1) != past_of(other, end + 1)


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ("curriculum.short.until=null", "curriculum.short.until", "null, and another stage follows"),
        ("curriculum.last.until=500ba", "curriculum.last.until", "the last stage goes on to the end of training"),
        ("curriculum.more.until=98ba", "curriculum.more.until", "ends at batch 98, and this one at batch 98"),
        ("curriculum.more.until=5ep", "curriculum.more.until", "got '5ep'"),
        ("curriculum.short.max_seq_len=1024", "curriculum.short.max_seq_len", "1024 is above the recipe's max_seq_len"),
        ("mesh.shard=3", "curriculum.more.global_train_batch_size", "8 sequences are not divisible"),
        ("curriculum.short.streams={prose: {proportion: 1}}", "curriculum.short.streams.prose", "no stream of train_"),
        ("curriculum.short.streams={code: {}}", "curriculum.short.streams.code.proportion", "missing"),
        ("train_loader.dataset={streams: null, local: a}", "curriculum.more.streams", "have no streams"),
        ("max_duration=2ep", "max_duration", "2ep, and the epochs of a curriculum are not all as long"),
        ("curriculum.short.seq_len=4", "curriculum.short.seq_len", "unknown key"),
        ("train_loader.dataset.packing.method=pairs", "curriculum", "pairs of preferences"),
        ("model.mtp.depth=255", "curriculum.short.max_seq_len", "predicts that many tokens further, in rows of 256"),
    ],
)
def test_what_is_refused_is_named(change: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe(change)
    assert path in [problem.path for problem in raised.value.problems]
    assert message in str(raised.value)


def test_a_curriculum_has_a_stage() -> None:
    with pytest.raises(ConfigError, match="curriculum: is empty"):
        load_recipe(None, [*QUICK, "curriculum={}"])
