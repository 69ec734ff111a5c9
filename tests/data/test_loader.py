"""Loaders: the right tokens, the same global batches on every number of ranks, exact resumption, early errors."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming.base.batching import generate_work
from streaming.base.world import World

from moefoundry.config import LoaderConfig, Recipe, UserError
from moefoundry.data.loader import build_loader
from moefoundry.data.token_dataset import number_documents
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from tests.data.shards import SEQ_LEN, VOCAB, config_of, tokens_of
from tests.distributed import run_distributed
from tests.train.runs import run_recipe


def test_batches_hold_the_samples_in_order(corpus: Path, build: Callable) -> None:
    loader = build(config_of(corpus, "val"), batch_size=3)
    samples = json.loads((corpus / "corpus.json").read_text())["splits"]["val"]["samples"]
    assert samples % 3, "the last batch is to be short"
    batches = list(loader)
    assert len(batches) == len(loader) == -(-samples // 3)
    for batch in batches:
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert torch.equal(batch["input_ids"], batch["labels"])
    read = torch.cat([batch["input_ids"] for batch in batches])
    assert read.shape == (samples, SEQ_LEN)
    raw = np.concatenate([loader.dataset.shards[0][index]["tokens"] for index in range(5)])
    assert read[:5].flatten().tolist() == raw.tolist()


def test_documents_are_numbered_and_end_with_their_end_of_text_token() -> None:
    tokens = torch.tensor([5, 0, 7, 8, 0, 0, 9])
    assert number_documents(tokens, eos_id=0).tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert number_documents(tokens, eos_id=4).tolist() == [0] * 7


@pytest.mark.parametrize("remote", [False, True])
def test_batches_tell_documents_apart(corpus: Path, build: Callable, tmp_path: Path, remote: bool) -> None:
    config = config_of(tmp_path / "cache", "val", remote=str(corpus)) if remote else config_of(corpus, "val")
    tokenizer = corpus / "tokenizer" if remote else tmp_path / "not read"
    batches = list(build(config, documents_of=tokenizer))
    eos_id = json.loads((corpus / "corpus.json").read_text())["eos_id"]
    borders = 0
    for batch in batches:
        assert batch["sequence_id"].dtype == torch.int64
        for tokens, documents in zip(batch["input_ids"].tolist(), batch["sequence_id"].tolist(), strict=True):
            steps = [after - before for before, after in itertools.pairwise(documents)]
            assert documents[0] == 0
            assert steps == [int(token == eos_id) for token in tokens[:-1]]
            borders += sum(steps)
    assert borders, "some sample is to hold a border"


def test_an_epoch_is_whole_batches_without_repeats_and_shuffled_anew(corpus: Path, build: Callable) -> None:
    loader = build(config_of(corpus), batch_size=8)
    total = loader.dataset.size
    assert total % 8, "something is to be cut"
    assert len(loader) == total // 8
    everything = {tuple(loader.dataset[index]["input_ids"].tolist()) for index in range(total)}
    epochs = [[tuple(sample) for batch in tokens_of(loader) for sample in batch] for _ in range(2)]
    for epoch in epochs:
        assert len(epoch) == total // 8 * 8
        assert set(epoch) <= everything
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]
    again = build(config_of(corpus), batch_size=8)
    assert [tuple(sample) for batch in tokens_of(again) for sample in batch] == epochs[0]
    other = build(config_of(corpus, shuffle_seed=6), batch_size=8)
    assert [tuple(sample) for batch in tokens_of(other) for sample in batch] != epochs[0]


@pytest.mark.parametrize("epoch", [0, 1])
def test_resuming_yields_exactly_the_remaining_batches(corpus: Path, build: Callable, epoch: int) -> None:
    first = build(config_of(corpus))
    for _ in range(epoch):
        tokens_of(first)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))  # it is saved as JSON
    assert (state["epoch"], state["sample_in_epoch"]) == (epoch, 12)
    rest = [batch["input_ids"].tolist() for batch in iterator]
    following = tokens_of(first)

    resumed = build(config_of(corpus))
    resumed.load_state_dict(state)
    assert tokens_of(resumed, batches=2) == rest[:2]
    twice = build(config_of(corpus))
    twice.load_state_dict(resumed.state_dict())
    assert tokens_of(twice) == rest[2:]
    assert tokens_of(twice) == following


def test_resuming_at_the_end_of_an_epoch_yields_nothing_then_the_next(corpus: Path, build: Callable) -> None:
    first = build(config_of(corpus))
    tokens_of(first)
    state = first.state_dict()
    following = tokens_of(first)
    resumed = build(config_of(corpus))
    resumed.load_state_dict(state)
    assert tokens_of(resumed) == []
    assert tokens_of(resumed) == following


@pytest.mark.parametrize("seen", [0, 24])
def test_global_batches_do_not_depend_on_ranks_nodes_or_workers(corpus: Path, build: Callable, seen: int) -> None:
    global_batch_size = 12
    dataset = build(config_of(corpus), batch_size=global_batch_size).dataset
    dataset._set_shuffle_block_size(World.detect())

    def global_batches(nodes: int, ranks: int, workers: int) -> list[list[int]]:
        """Sorted sample ids of each global batch, dealt out as the library does for so many processes."""
        dataset.batch_size = global_batch_size // (nodes * ranks)
        dealt = generate_work("random", dataset, World(nodes, ranks, workers, 0), 1, seen)
        in_time = dealt.transpose(3, 2, 0, 1, 4).reshape(-1, global_batch_size)  # batch, worker | node, rank, sample
        return [sorted(batch) for batch in in_time.tolist() if -1 not in batch]

    reference = global_batches(1, 1, 1)
    assert len(reference) == (dataset.size - seen) // global_batch_size
    for nodes, ranks, workers in [(1, 2, 1), (1, 3, 1), (1, 4, 2), (2, 1, 1), (2, 3, 2), (3, 2, 1), (4, 1, 3)]:
        assert global_batches(nodes, ranks, workers) == reference, (nodes, ranks, workers)


Sample = tuple[int, ...]


def read_on(config: LoaderConfig, batch_size: int, state: dict | None, batches: int) -> tuple[list[list[Sample]], dict]:
    """This rank's part of the next global batches, and the position after them."""
    loader = build_loader(config, batch_size=batch_size, model_vocab_size=VOCAB)
    if state is not None:
        loader.load_state_dict(state)
    taken = [[tuple(sample) for sample in batch] for batch in tokens_of(loader, batches)]
    return taken, loader.state_dict()


def test_row4_other_numbers_of_ranks_read_the_same_global_batches_from_the_middle_of_an_epoch(corpus: Path) -> None:
    """Saved on 2 ranks after 2 batches; the rest of the epoch, and that it is the rest, on 1, 3 and 4."""
    config, global_batch_size = config_of(corpus), 12

    def on(ranks: int, state: dict | None, batches: int) -> tuple[list[list[Sample]], dict]:
        results = run_distributed(read_on, ranks, config, global_batch_size // ranks, state, batches)
        parts = zip(*(taken for taken, _ in results), strict=True)
        return [sorted(itertools.chain(*ranks_parts)) for ranks_parts in parts], results[0][1]

    whole, _ = on(1, None, 10**6)
    first, state = on(2, None, 2)
    assert first == whole[:2]
    assert state["sample_in_epoch"] == 2 * global_batch_size
    for ranks in (1, 3, 4):
        assert on(ranks, state, 10**6)[0] == whole[2:], ranks


def counted(config: LoaderConfig, batch_size: int) -> list[list[Sample]]:
    """This rank's batches of an epoch, each the samples whose labels count."""
    loader = build_loader(config, batch_size=batch_size, model_vocab_size=VOCAB)
    batches = []
    for batch in loader:
        ignored = (batch["labels"] == IGNORE_INDEX).all(1)
        assert torch.equal(batch["labels"][~ignored], batch["input_ids"][~ignored])
        batches.append([tuple(sample) for sample in batch["input_ids"][~ignored].tolist()])
    return batches


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 0), (4, 1)])
def test_evaluation_counts_every_sample_once_on_any_number_of_ranks(corpus: Path, ranks: int, workers: int) -> None:
    config = replace(config_of(corpus, "val"), num_workers=workers)
    samples = json.loads((corpus / "corpus.json").read_text())["splits"]["val"]["samples"]
    by_rank = run_distributed(counted, ranks, config, 3)
    assert len({len(batches) for batches in by_rank}) == 1, "every rank has as many batches"
    everything = [sample for batches in by_rank for batch in batches for sample in batch]
    assert len(everything) == samples
    assert sorted(everything) == sorted(itertools.chain(*run_distributed(counted, 1, config, 3)[0]))


@pytest.mark.slow
def test_the_held_out_loss_is_one_number_on_any_number_of_ranks(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """After a step that changes next to nothing. What differs is the order of sums in fp32."""
    steps = ("max_duration=2ba", "eval_interval=1ba", "global_train_batch_size=6", "optimizer.lr=1e-30")
    steps += ("device_train_microbatch_size=1", "device_eval_batch_size=3")

    def loss(ranks: int) -> float:
        return run_recipe(tiny_recipe(tmp_path / str(ranks), *steps), ranks).column(
            "metrics/eval/LanguageCrossEntropy"
        )[1]

    alone = loss(1)
    for ranks in (2, 3):
        assert loss(ranks) == pytest.approx(alone, rel=1e-6), ranks


def test_workers_keep_the_order(corpus: Path, build: Callable) -> None:
    expected = tokens_of(build(config_of(corpus)), batches=5)
    config = replace(config_of(corpus), num_workers=2)
    assert tokens_of(build(config), batches=5) == expected


def test_missing_corpus_gives_the_command(build: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        build(config_of(tmp_path / "my data"), model_vocab_size=4096)
    command = f"moefoundry prepare stdlib '{tmp_path}/my data' --vocab-size 4096"
    assert f"my data: no such directory (the recipe's dataset.local); make it with: {command}" in str(raised.value)


def test_corpus_that_does_not_fit_the_recipe_is_refused(corpus: Path, build: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"packed to max_seq_len {SEQ_LEN}, and the recipe's max_seq_len is 64"):
        build(config_of(corpus, max_seq_len=64))
    with pytest.raises(UserError, match=f"vocabulary of {VOCAB} exceeds the model's vocab_size {VOCAB - 1}"):
        build(config_of(corpus), model_vocab_size=VOCAB - 1)
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        build(config_of(corpus, split="test"))
    with pytest.raises(UserError, match=r"train: \d+ sample\(s\), fewer than one global batch of 5000"):
        build(config_of(corpus), batch_size=5000)
    with pytest.raises(UserError, match=r"corpus\.json: No such file or directory; not a directory that"):
        build(config_of(tmp_path))


def test_damaged_corpus_is_named_before_anything_is_read(corpus: Path, build: Callable, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    shard = copy / "train" / "shard.00001.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train/shard\.00001\.mds: truncated shard"):
        build(config_of(copy))
    shard.unlink()
    with pytest.raises(UserError, match=r"train/shard\.00001\.mds: missing shard"):
        build(config_of(copy))
    shard.write_bytes(content)
    index = copy / "train" / "index.json"
    index.write_text("")
    with pytest.raises(UserError, match=r"index\.json: cannot be read"):
        build(config_of(copy))
    (copy / "corpus.json").write_text("{")
    with pytest.raises(UserError, match=r"corpus\.json: damaged"):
        build(config_of(copy))


def test_remote_data_are_downloaded_and_checked_as_they_arrive(corpus: Path, build: Callable, tmp_path: Path) -> None:
    here = tokens_of(build(config_of(corpus)), batches=2)
    config = config_of(tmp_path / "cache", remote=str(corpus))
    assert tokens_of(build(config), batches=2) == here
    longer = config_of(tmp_path / "cache2", remote=str(corpus), max_seq_len=64)
    with pytest.raises(UserError, match=rf"samples of {SEQ_LEN} tokens, and the recipe's max_seq_len is 64"):
        build(longer)
    with pytest.raises(UserError, match=r"token \d+, and the model's vocab_size is 20"):
        tokens_of(build(config_of(tmp_path / "cache3", remote=str(corpus)), model_vocab_size=20))
