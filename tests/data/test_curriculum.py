"""Rows of a curriculum: none twice and none lost, the same on any ranks and workers and after a stop at any batch."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moefoundry.config import UserError
from moefoundry.config.curriculum import Stage
from moefoundry.config.schema_data import FimConfig, FimFormat, FimSplit, PackingConfig, PackingMethod, StreamConfig
from moefoundry.config.schema_parts import LoaderConfig
from moefoundry.data.curriculum import rows_between
from moefoundry.data.loader import build_loader
from moefoundry.data.packing_plan import PackingPlan, best_fit, concatenated, left_over, repacked
from tests.data.shards import VOCAB, config_of
from tests.data.test_rows import documents_in, tokens_of_rows
from tests.distributed import run_distributed

BEST_FIT = PackingConfig(PackingMethod.best_fit)
CONCAT = PackingConfig(PackingMethod.concat)
LONGEST = 32
STAGES = (
    Stage("short", 0, 7, batch_size=8, seq_len=8, microbatch_size=1, proportions=(("code", 1.0), ("text", 3.0))),
    Stage("same", 7, 10, batch_size=4, seq_len=8, microbatch_size=1, proportions=(("code", 3.0), ("text", 1.0))),
    Stage("middle", 10, 16, batch_size=4, seq_len=16, microbatch_size=1, proportions=(("text", 1.0),)),
    Stage("long", 16, None, batch_size=8, seq_len=LONGEST, microbatch_size=1),
)
ALL = 26  # batches
Batch = list[tuple[int, ...]]


def data(mixture: Path, **changes: Any) -> LoaderConfig:
    """Both streams; ``changes`` are keys of the dataset."""
    streams = {name: StreamConfig(local=str(mixture / name)) for name in ("text", "code")}
    return config_of(mixture / "text", **{"streams": streams, "max_seq_len": LONGEST, "packing": BEST_FIT} | changes)


def test_rows_of_streams_alternate_as_evenly_as_their_shares_allow() -> None:
    streams, before = rows_between(np.array([0.75, 0.25]), 0, 8)
    assert (streams.tolist(), before.tolist()) == ([0, 0, 1, 0, 0, 0, 1, 0], [0, 0])
    draws = np.random.default_rng(0)
    for _ in range(50):
        shares = draws.dirichlet(np.ones(draws.integers(1, 6)) * 0.4)
        shares[draws.random(len(shares)) < 0.2] = 0
        shares = np.ones(1) if not shares.sum() else shares / shares.sum()
        whole, _ = rows_between(shares, 0, 400)
        cuts = [0, *sorted(draws.integers(0, 400, 4).tolist()), 400]
        for first, stop in itertools.pairwise(cuts):
            part, before = rows_between(shares, first, stop)
            assert part.tolist() == whole[first:stop].tolist(), "the rows do not depend on where one begins"
            assert before.tolist() == np.bincount(whole[:first], minlength=len(shares)).tolist()
            assert (abs(before - first * shares) <= (len(shares) + 1) / 2).all()
    _, far = rows_between(np.array([0.1, 0.2, 0.7]), 10**10, 10**10 + 5)
    assert (abs(far - np.array([1, 2, 7]) * 10**9) < 2).all()
    assert far.sum() == 10**10


def places(plan: PackingPlan, rows: np.ndarray) -> Counter[tuple[int, int]]:
    """Document and position of every token of some rows."""
    found: Counter[tuple[int, int]] = Counter()
    for row in np.flatnonzero(rows):
        for number in range(plan.splits[row + 1] - plan.splits[row]):
            document, start, stop = plan.piece(row, number)
            found.update((document, place) for place in range(start, stop))
    return found


@pytest.mark.parametrize("packer", [concatenated, best_fit])
def test_what_is_left_of_a_plan_is_packed_anew_with_nothing_lost(packer: Callable[..., PackingPlan]) -> None:
    """Twice, by a brute-force count of every token."""
    draws = np.random.default_rng(1)
    for _ in range(20):
        lengths = draws.integers(1, 40, 30)
        plan, read = packer(lengths, 7), Counter[tuple[int, int]]()
        for seq_len in (16, 5):
            unread = draws.random(plan.rows) < 0.5
            unread[0] = True
            read += places(plan, ~unread)
            fragments = left_over(plan, unread)
            pairs = list(zip(fragments.documents.tolist(), fragments.starts.tolist(), strict=True))
            assert pairs == sorted(pairs)
            same = fragments.documents[1:] == fragments.documents[:-1]
            assert (fragments.starts[1:][same] > fragments.stops[:-1][same]).all(), "what is one is not cut"
            plan = repacked(packer, fragments, seq_len)
            assert np.diff(plan.splits).min() > 0
        read += places(plan, np.ones(plan.rows, bool))
        assert read == Counter((document, place) for document, n in enumerate(lengths) for place in range(n))


@pytest.mark.parametrize("packing", [CONCAT, BEST_FIT])
def test_every_epoch_of_a_stream_is_read_whole_across_the_borders(
    mixture: Path, build: Callable, packing: PackingConfig
) -> None:
    loader = build(data(mixture, packing=packing), stages=STAGES, documents_of=mixture / "text" / "tokenizer")
    batches: list[dict[str, torch.Tensor]] = []
    while len(batches) < 60:
        batches += list(loader)
    for number, batch in enumerate(batches):
        (stage,) = (each for each in STAGES if each.first <= number < (each.end or 10**6))
        assert batch["input_ids"].shape == batch["sequence_id"].shape == (stage.batch_size, stage.seq_len)
    sources = torch.cat([batch["source"] for batch in batches]).tolist()
    rows = tokens_of_rows(batches)
    short = [source for batch in batches[:7] for source in batch["source"].tolist()]
    assert short.count(0) == 14, "code has a quarter of 56 rows"
    assert all(1 <= batch["source"].tolist().count(0) <= 3 for batch in batches[:7])
    assert not any((batch["source"] == 0).any() for batch in batches[10:16]), "the stage reads text alone"
    for source, name in enumerate(("code", "text")):
        expected = Counter(itertools.chain(*documents_in(mixture / name / "train")))
        epoch: Counter[int] = Counter()
        epochs = 0
        for row in (row for row, own in zip(rows, sources, strict=True) if own == source):
            epoch.update(row)
            if epoch.total() == expected.total():
                assert epoch == expected
                epoch, epochs = Counter(), epochs + 1
            assert epoch.total() < expected.total(), "an epoch ends with a row"
        assert epochs >= 2, name
    assert loader.dataset.describe_packing()[2] == "stage middle: batches 11 to 16, 4 x 16 tokens, text 1"


def test_documents_are_reordered_as_a_whole_though_an_epoch_changes_its_length(mixture: Path, build: Callable) -> None:
    """Every document of the first epoch is there once, and what is reordered is the same in rows of any length."""
    stages = (replace(STAGES[2], first=0, end=3, proportions=None), replace(STAGES[3], first=3))
    fim = FimConfig(rate=1.0, split=FimSplit.tokens, format=FimFormat.psm)
    directory = mixture / "text"
    config = replace(data(mixture, streams=None, fim=fim, packing=CONCAT, shuffle=False), drop_last=False)
    of_lengths = []
    for chosen in (stages, (replace(STAGES[3], first=0),)):
        loader = build(config, stages=chosen, tokenizer=directory / "tokenizer")
        rows: list[list[int]] = []
        while len(rows) < 200:
            rows += tokens_of_rows(list(loader))
        of_lengths.append(list(itertools.chain(*rows))[:2000])
    assert of_lengths[0] == of_lengths[1], "unshuffled, joined documents are one stream of tokens"


def read_on(
    config: LoaderConfig, tokenizer: Path, stages: tuple[Stage, ...], state: dict | None, batches: int
) -> tuple[list[Batch], dict]:
    """This rank's part of the next global batches, all that they hold, and the position after them."""
    loader = build_loader(
        config, batch_size=0, model_vocab_size=VOCAB, documents_of=tokenizer, tokenizer=tokenizer, stages=stages
    )
    if state is not None:
        loader.load_state_dict(state)
    taken: list[Batch] = []
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(endless, batches):
        columns = [batch[name] for name in ("input_ids", "labels", "sequence_id")]
        rows = torch.cat([*columns, batch["source"].unsqueeze(1)], dim=1).tolist()
        taken.append([tuple(row) for row in rows])
    return taken, loader.state_dict()


SOME = ([(2, 2)], {6: [(1, 0)], 7: [(4, 2)], 12: [(2, 0)]})
EVERY = tuple(itertools.product((1, 2, 4), (0, 2)))
EXHAUSTIVE = (EVERY, dict.fromkeys((1, 6, 7, 8, 10, 15, 16, 17, 21), EVERY))


@pytest.mark.parametrize("cases", [SOME, pytest.param(EXHAUSTIVE, marks=pytest.mark.slow)], ids=["some", "all"])
def test_batches_are_the_same_on_any_ranks_and_workers_and_after_a_stop(mixture: Path, cases: Any) -> None:
    """Token for token; stopped in a stage, at its border, and behind it."""
    fim = FimConfig(rate=0.7, split=FimSplit.characters)
    config, tokenizer = data(mixture, fim=fim), mixture / "text" / "tokenizer"

    def on(ranks: int, workers: int, state: dict | None, batches: int) -> tuple[list[Batch], dict]:
        chosen = replace(config, num_workers=workers)
        results = run_distributed(read_on, ranks, chosen, tokenizer, STAGES, state, batches)
        parts = zip(*(taken for taken, _ in results), strict=True)
        return [sorted(itertools.chain(*of_ranks)) for of_ranks in parts], results[0][1]

    whole, _ = on(1, 0, None, ALL)
    assert len({tuple(batch) for batch in whole}) == ALL
    for ranks, workers in cases[0]:
        assert on(ranks, workers, None, ALL)[0] == whole, (ranks, workers)
    for stop, places_of_it in cases[1].items():
        first, state = on(2, 0, None, stop)
        assert first == whole[:stop]
        for ranks, workers in places_of_it:
            assert on(ranks, workers, state, ALL - stop)[0] == whole[stop:], (stop, ranks, workers)


def test_a_saved_position_brings_its_seed_whatever_the_recipe_says(mixture: Path, build: Callable) -> None:
    """Shares of stages that name none are those of an epoch, where the seed decides who gets what rounding leaves."""
    shares = {"text": 0.75, "code": 0.25}
    streams = {name: StreamConfig(local=str(mixture / name), proportion=share) for name, share in shares.items()}
    stages = (replace(STAGES[3], first=0),)

    def rows_from(seed: int, state: dict | None, batches: int) -> tuple[list[Any], dict]:
        loader = build(data(mixture, streams=streams, shuffle_seed=seed), stages=stages)
        if state is not None:
            loader.load_state_dict(state)
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        return [batch["input_ids"].tolist() for batch in itertools.islice(endless, batches)], loader.state_dict()

    whole, _ = rows_from(0, None, 60)
    _, state = rows_from(0, None, 5)
    for seed in range(1, 7):
        assert rows_from(seed, state, 55)[0] == whole[5:], seed


def test_a_change_of_the_stages_to_come_changes_no_batch_before(mixture: Path, build: Callable) -> None:
    changed = (*STAGES[:2], replace(STAGES[2], end=14, batch_size=8), replace(STAGES[3], first=14))
    taken = []
    for stages in (STAGES, changed):
        loader = build(data(mixture), stages=stages)
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        taken.append([batch["input_ids"].tolist() for batch in itertools.islice(endless, 12)])
    assert taken[0][:10] == taken[1][:10]
    assert taken[0][10] != taken[1][10]


def test_rows_packed_at_preparation_keep_their_length(mixture: Path, build: Callable) -> None:
    config = data(mixture, streams=None, local=str(mixture / "packed"), max_seq_len=16, packing=CONCAT)
    stages = (replace(STAGES[2], first=0, end=3, proportions=None), replace(STAGES[3], first=3, seq_len=16))
    batches = list(build(config, stages=stages))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4]
    with pytest.raises(UserError, match=r"packed to 16 tokens when prepared, and stage long has rows of 32; prepare"):
        build(config, stages=(replace(STAGES[3], first=0),))
    with pytest.raises(UserError, match="fewer than one global batch"):
        build(data(mixture), stages=(replace(STAGES[3], first=0, batch_size=4096),))
