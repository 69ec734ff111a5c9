"""Rows of documents: packed as they are read, the same on any number of ranks and workers, and after any stop."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from moefoundry.config import ConfigError, LoaderConfig, UserError, load_recipe
from moefoundry.config.schema_data import FimConfig, FimSplit, PackingConfig, PackingMethod, StreamConfig
from moefoundry.data.fim import Sentinels, restored
from moefoundry.data.loader import build_loader
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import Layout, read_corpus_summary
from moefoundry.data.token_dataset import cut
from moefoundry.data.tokenizer import load_tokenizer
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from tests.conftest import QUICK
from tests.data.shards import SEQ_LEN, VOCAB, config_of, flip_bit
from tests.distributed import run_distributed

BEST_FIT = PackingConfig(PackingMethod.best_fit)
Row = tuple[int, ...]


def documents_in(directory: Path) -> list[list[int]]:
    """By mosaicml-streaming's own reader."""
    from streaming import LocalDataset

    return [sample["tokens"].tolist() for sample in LocalDataset(str(directory))]


def tokens_of_rows(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Tokens of each row without the room left at its end, which is checked to be marked."""
    rows = []
    for batch in batches:
        for ids, labels, documents in zip(batch["input_ids"], batch["labels"], batch["sequence_id"], strict=True):
            used = int((documents >= 0).sum())
            assert (documents[:used] >= 0).all()
            assert (documents[used:] == -1).all()
            assert (labels[used:] == IGNORE_INDEX).all()
            assert torch.equal(labels[:used], ids[:used])
            rows.append(ids[:used].tolist())
    return rows


def test_concatenated_rows_are_the_samples_that_prepare_would_pack(mixture: Path, build: Callable) -> None:
    for split in ("train", "val"):
        config = replace(config_of(mixture / "text", split, shuffle=False), drop_last=False)
        rows = tokens_of_rows(list(build(config)))
        stream = list(itertools.chain(*documents_in(mixture / "text" / split)))
        assert list(itertools.chain(*rows)) == stream
        packed = replace(config_of(mixture / "packed", split, shuffle=False), drop_last=False)
        samples = torch.cat([batch["input_ids"] for batch in build(packed)]).tolist()
        assert rows[: len(samples)] == samples
        assert len(rows) == len(samples) + (len(stream) % SEQ_LEN > 0)


@pytest.mark.parametrize("apart", [False, True])
def test_best_fit_keeps_documents_whole(mixture: Path, build: Callable, apart: bool) -> None:
    config = config_of(mixture / "text", "val", packing=BEST_FIT, max_seq_len=32)
    batches = list(build(config, documents_of=mixture / "text" / "tokenizer" if apart else None))
    rows, expected = tokens_of_rows(batches), documents_in(mixture / "text" / "val")
    eos = read_corpus_summary(mixture / "text").eos_id
    numbers = [row for batch in batches for row in batch["sequence_id"].tolist()]
    found: Counter[Row] = Counter()
    for row, documents in zip(rows, numbers, strict=True):
        ends = [0, *(place + 1 for place, token in enumerate(row) if token == eos)]
        assert ends[-1] == len(row) or len(row) == 32, "only a document longer than a row is cut"
        found.update(tuple(row[start:end]) for start, end in itertools.pairwise(ends))
        whole = [number for number, (start, end) in enumerate(itertools.pairwise(ends)) for _ in row[start:end]]
        if ends[-1] == len(row):
            assert documents[: len(row)] == (whole if apart else [0] * len(row))
    short = Counter(tuple(document) for document in expected if len(document) <= 32)
    assert found >= short
    assert len(list(itertools.chain(*rows))) == sum(map(len, expected))
    assert max(map(len, numbers)) == 32


def loader_of(mixture: Path, **changes: Any) -> LoaderConfig:
    """Both streams, unevenly, with fill-in-the-middle of most documents."""
    streams = {
        "text": StreamConfig(local=str(mixture / "text"), proportion=0.75),
        "code": StreamConfig(local=str(mixture / "code"), proportion=0.25),
    }
    fim = FimConfig(rate=0.7, split=FimSplit.characters)
    keys = {"streams": streams, "fim": fim, "packing": BEST_FIT} | changes
    return config_of(mixture / "text", **keys)


def read_on(
    config: LoaderConfig, tokenizer: Path, batch_size: int, state: dict | None, batches: int
) -> tuple[list[list[Row]], dict]:
    """This rank's part of the next global batches, all that they hold, and the position after them."""
    loader = build_loader(
        config, batch_size=batch_size, model_vocab_size=VOCAB, documents_of=tokenizer, tokenizer=tokenizer
    )
    if state is not None:
        loader.load_state_dict(state)
    taken = []
    for batch in itertools.islice(itertools.chain(loader, loader), batches):
        columns = [batch[name] for name in ("input_ids", "labels", "sequence_id")]
        rows = torch.cat([*columns, batch["source"].unsqueeze(1)], dim=1).tolist()
        taken.append([tuple(row) for row in rows])
    return taken, loader.state_dict()


QUICK_CASES = ([(2, 2)], [(1, 2), (4, 0)])
ALL_CASES = ([(2, 0), (4, 0), (1, 2), (2, 2), (4, 2)], [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])


@pytest.mark.parametrize("cases", [QUICK_CASES, pytest.param(ALL_CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_global_batches_are_the_same_on_any_ranks_and_workers_and_after_a_stop(mixture: Path, cases: Any) -> None:
    """Token for token, for two epochs, with two streams and fill-in-the-middle; stopped in the middle of the second."""
    config, tokenizer, global_batch = loader_of(mixture), mixture / "text" / "tokenizer", 4

    def on(ranks: int, workers: int, state: dict | None, batches: int) -> tuple[list[list[Row]], dict]:
        chosen = replace(config, num_workers=workers)
        results = run_distributed(read_on, ranks, chosen, tokenizer, global_batch // ranks, state, batches)
        parts = zip(*(taken for taken, _ in results), strict=True)
        return [sorted(itertools.chain(*of_ranks)) for of_ranks in parts], results[0][1]

    whole, _ = on(1, 0, None, 10**6)
    an_epoch = len(whole) // 2
    assert whole[:an_epoch] != whole[an_epoch:]
    for ranks, workers in cases[0]:
        assert on(ranks, workers, None, 10**6)[0] == whole, (ranks, workers)
    first, state = on(2, 0, None, an_epoch + 2)
    assert (first, state["epoch"], state["sample_in_epoch"]) == (whole[: an_epoch + 2], 1, 2 * global_batch)
    for ranks, workers in cases[1]:
        assert on(ranks, workers, state, an_epoch - 2)[0] == whole[an_epoch + 2 :], (ranks, workers)


@pytest.mark.parametrize(("workers", "shuffle"), [(0, True), (2, True), (0, False)])
def test_a_saved_position_brings_its_seed_whatever_the_recipe_says(
    mixture: Path, build: Callable, workers: int, shuffle: bool
) -> None:
    """The seed also decides which stream gets the row that rounding leaves, and all that follows from it."""
    tokenizer = mixture / "text" / "tokenizer"

    def of_seed(seed: int) -> Any:
        config = loader_of(mixture, shuffle=shuffle, shuffle_seed=seed)
        return build(replace(config, num_workers=workers), tokenizer=tokenizer)

    def rows_of(loader: Any) -> list[list[int]]:
        return torch.cat([torch.cat([each["input_ids"], each["source"][:, None]], dim=1) for each in loader]).tolist()

    first = of_seed(0)
    whole, chosen = rows_of(first), [stream.choose for stream in first.dataset.streams]
    state = first.state_dict() | {"epoch": 0, "sample_in_epoch": 8}
    others = [of_seed(seed) for seed in range(1, 7)]
    assert not shuffle or any([stream.choose for stream in other.dataset.streams] != chosen for other in others)
    for other in others:
        other.load_state_dict(state)
        assert rows_of(other) == whole[8:]


@pytest.mark.parametrize("split", list(FimSplit))
def test_fim_reorders_other_documents_in_every_epoch_and_loses_none(
    mixture: Path, build: Callable, split: FimSplit
) -> None:
    directory = mixture / "text"
    tokenizer = load_tokenizer(directory / "tokenizer")
    sentinels = Sentinels.of(tokenizer.backend, directory)
    expected = Counter(tokenizer.backend.decode(ids) for ids in documents_in(directory / "train"))
    config = config_of(directory, fim=FimConfig(rate=0.5, split=split), packing=BEST_FIT, max_seq_len=64)
    loader = build(replace(config, drop_last=False), tokenizer=directory / "tokenizer")
    epochs = []
    for _ in range(2):
        assert len(list(loader)) == len(loader), "every epoch has as many rows"
        dataset = loader.dataset
        rows = tokens_of_rows([torch.utils.data.default_collate([dataset[row]]) for row in range(dataset.size)])
        documents = []
        for row in rows:
            ends = [0, *(place + 1 for place, token in enumerate(row) if token == tokenizer.eos_id)]
            documents += [np.array(row[start:end]) for start, end in itertools.pairwise(ends)]
        back = Counter(tokenizer.backend.decode(restored(document, sentinels).tolist()) for document in documents)
        assert back == expected
        epochs.append({tuple(document.tolist()) for document in documents if document[0] == sentinels.prefix})
        assert 0.3 < len(epochs[-1]) / len(documents) < 0.7
    assert epochs[0] != epochs[1]


def test_without_a_shuffle_every_epoch_is_the_same_and_whole(mixture: Path, build: Callable) -> None:
    directory = mixture / "text"
    config = config_of(directory, "val", fim=FimConfig(rate=0.5), packing=BEST_FIT)
    loader = build(config, tokenizer=directory / "tokenizer")
    first, second = (tokens_of_rows(list(loader)) for _ in range(2))
    assert first == second
    expected, sentinels = documents_in(directory / "val"), 3
    assert (sum(map(len, first)) - sum(map(len, expected))) % sentinels == 0 < sum(map(len, first))


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ([{"proportion": 3}, {"proportion": 1}], (0.75, 0.25)),
        ([{"repeat": 2}, {}], (2, 1)),
        ([{"choose": 12}, {"repeat": 0.5}], (12, 0.5)),
    ],
)
def test_streams_are_drawn_from_as_their_keys_say(
    mixture: Path, build: Callable, keys: list[dict[str, Any]], shares: tuple[float, float]
) -> None:
    streams = {
        name: StreamConfig(local=str(mixture / name), **weights)
        for name, weights in zip(("text", "code"), keys, strict=True)
    }
    loader = build(replace(config_of(mixture / "text", streams=streams), drop_last=False), batch_size=1)
    code, text = (source.rows for source in loader.dataset.sources)  # in the order of their names
    batches = list(loader)
    counts = Counter(int(batch["source"]) for batch in batches)
    expected = {
        (0.75, 0.25): (0.75 * (text + code), 0.25 * (text + code)),
        (2, 1): (2 * text, code),
        (12, 0.5): (12, code // 2),
    }[shares]
    assert [counts[1], counts[0]] == pytest.approx(expected, abs=1)
    assert len(batches) == len(loader) == sum(counts.values())
    seen = Counter(tuple(batch["input_ids"][0].tolist()) for batch in batches if int(batch["source"]) == 1)
    if shares == (2, 1):
        assert set(seen.values()) <= {2, 4}, "each row comes twice"
        assert all((batch["labels"] != IGNORE_INDEX).any() for batch in batches), "and counts twice"
    elif shares == (12, 0.5):
        assert len(seen) > 9, "none comes twice before every other has come"
    backend = load_tokenizer(mixture / "text" / "tokenizer").backend
    for batch in batches:
        text_of_row = backend.decode(batch["input_ids"][batch["sequence_id"] >= 0].tolist())
        assert any(letter in text_of_row for letter in "lin") <= (int(batch["source"]) == 1)
        assert any(letter in text_of_row for letter in "x=") <= (int(batch["source"]) == 0)


def test_documents_and_packed_samples_may_be_mixed(mixture: Path, build: Callable) -> None:
    streams = {name: StreamConfig(local=str(mixture / name)) for name in ("packed", "code")}
    config = replace(config_of(mixture / "packed", streams=streams), drop_last=False)
    rows = {0: [], 1: []}
    for batch in build(config, batch_size=1, documents_of=mixture / "text" / "tokenizer"):
        rows[int(batch["source"])] += tokens_of_rows([batch])
    packed = json.loads((mixture / "packed" / "corpus.json").read_text())["splits"]["train"]["samples"]
    assert len(rows[1]) == packed
    stream = itertools.chain(*documents_in(mixture / "code" / "train"))
    assert sorted(itertools.chain(*rows[0])) == sorted(stream)


def instruction_data(out: Path, tokenizer_of: Path) -> Path:
    """Documents with ``targets``: the second half of each is to be predicted."""
    shutil.copytree(tokenizer_of / "tokenizer", out / "tokenizer")
    columns = {"tokens": "ndarray:uint16", "targets": "ndarray:uint8"}
    lengths = list(range(4, 24))
    with MDSWriter(columns=columns, out=str(out / "train"), hashes=["xxh64"]) as writer:
        for length in lengths:
            tokens = np.full(length, length, np.uint16)
            writer.write({"tokens": tokens, "targets": (np.arange(length) >= length // 2).astype(np.uint8)})
    np.save(out / "train" / "lengths.npy", np.array(lengths, np.int32))
    return out


def test_targets_say_what_is_predicted_and_such_documents_are_not_reordered(
    mixture: Path, build: Callable, tmp_path: Path
) -> None:
    there = instruction_data(tmp_path / "there", mixture / "text")
    config = config_of(
        tmp_path / "cache", remote=str(there), fim=FimConfig(rate=1.0), packing=BEST_FIT, max_seq_len=32, shuffle=False
    )
    tokenizer = mixture / "text" / "tokenizer"
    batches = list(build(replace(config, drop_last=False), tokenizer=tokenizer, documents_of=tokenizer))
    lengths = set()
    for batch in batches:
        for ids, labels, documents in zip(batch["input_ids"], batch["labels"], batch["sequence_id"], strict=True):
            for number in range(int(documents.max()) + 1):
                own = documents == number
                length = int(own.sum())
                lengths.add(length)
                assert (ids[own] == length).all()
                assert labels[own].tolist() == [IGNORE_INDEX] * (length // 2) + [length] * (length - length // 2)
    assert lengths == set(range(4, 24))


def test_remote_documents_are_downloaded_with_their_lengths(mixture: Path, build: Callable, tmp_path: Path) -> None:
    here = loader_of(mixture, streams=None)
    there = loader_of(mixture, streams=None, local=str(tmp_path / "cache"), remote=str(mixture / "text"))
    tokenizer = mixture / "text" / "tokenizer"
    taken = [
        [batch["input_ids"].tolist() for batch in build(config, tokenizer=tokenizer, documents_of=tokenizer)]
        for config in (here, there)
    ]
    assert taken[0] == taken[1]
    assert (tmp_path / "cache" / "train" / "lengths.npy").exists()
    lacking = shutil.copytree(mixture / "text", tmp_path / "lacking")
    (lacking / "train" / "lengths.npy").unlink()
    config = config_of(tmp_path / "cache 2", remote=str(lacking))
    with pytest.raises(UserError, match=rf"^{lacking}/train/lengths\.npy: cannot be downloaded: "):
        build(config)


def test_a_bad_shard_of_one_of_several_streams_is_named(mixture: Path, build: Callable, tmp_path: Path) -> None:
    copy = shutil.copytree(mixture, tmp_path / "copy")
    bad = sorted((copy / "code" / "train").glob("shard.*"))[1]
    flip_bit(bad)
    config = loader_of(copy, fim=None)
    message = f"^{bad}: corrupt shard: its xxh64 is not the one in the index; prepare the data again$"
    with pytest.raises(UserError, match=message):
        list(build(config))
    dataset = build(config).dataset
    with pytest.raises(UserError, match=message):
        [dataset[row] for row in range(dataset.size)]


def test_lengths_that_are_not_those_of_the_documents_are_named(mixture: Path, build: Callable, tmp_path: Path) -> None:
    copy = shutil.copytree(mixture / "text", tmp_path / "copy")
    file = copy / "val" / "lengths.npy"
    lengths = np.load(file)
    np.save(file, np.roll(lengths, 1))
    with pytest.raises(UserError, match=r"lengths\.npy: damaged: not what corpus\.json says; prepare the data again"):
        build(config_of(copy, "val"))
    remote = config_of(tmp_path / "cache", "val", remote=str(copy))
    with pytest.raises(UserError, match=r"val: document \d+ has \d+ tokens, and lengths\.npy says \d+; prepare the"):
        list(build(remote))
    for content, reason in ((lengths[1:], "shards have"), (lengths * 0, "damaged"), (lengths.astype(float), "damaged")):
        np.save(file, content)
        with pytest.raises(UserError, match=rf"lengths\.npy: .*{reason}"):
            build(
                config_of(
                    tmp_path / f"cache of {len(content)} {content.dtype} {content.sum()}", "val", remote=str(copy)
                )
            )
    file.write_bytes(b"not numpy")
    with pytest.raises(UserError, match=r"lengths\.npy: cannot be read"):
        build(config_of(tmp_path / "cache 3", "val", remote=str(copy)))
    file.unlink()
    with pytest.raises(UserError, match=r"lengths\.npy: no such file; prepare the data again"):
        build(config_of(copy, "val"))


def test_what_was_packed_at_preparation_is_not_packed_again(mixture: Path, build: Callable) -> None:
    packed, tokenizer = mixture / "packed", mixture / "packed" / "tokenizer"
    with pytest.raises(UserError, match="best_fit packs documents, and these data were packed when they were prepared"):
        build(config_of(packed, packing=BEST_FIT))
    with pytest.raises(UserError, match="reorders documents, and these data were packed when they were prepared"):
        build(config_of(packed, fim=FimConfig()), tokenizer=tokenizer)


def test_streams_that_do_not_go_together_are_named(mixture: Path, build: Callable, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (tmp_path / "in").mkdir()
    for number in range(9):
        (tmp_path / "in" / f"{number}.txt").write_text("other words\n" * 9)
    prepare(PrepareOptions(str(tmp_path / "in"), other, vocab_size=270, val_fraction=0, layout=Layout.documents))
    streams = {"text": StreamConfig(local=str(mixture / "text")), "other": StreamConfig(local=str(other))}
    with pytest.raises(UserError, match=r"has another tokenizer than loader\.dataset\.streams\.other; one"):
        build(config_of(mixture / "text", streams=streams))
    weights = "{a: {local: x, repeat: 1, choose: 2}, b: {local: y, proportion: 1}}"
    with pytest.raises(ConfigError) as raised:
        load_recipe(None, [*QUICK, f"train_loader.dataset.streams={weights}"])
    assert [problem.path for problem in raised.value.problems] == [
        "train_loader.dataset.streams.a",
        "train_loader.dataset.streams",
    ]


def test_an_epoch_is_cut_where_most_rows_are() -> None:
    cases = (([9, 5, 1], 3, [6, 5, 1]), ([4, 4], 3, [2, 3]), ([7], 3, [4]), ([2, 2], 0, [2, 2]))
    for choices, excess, expected in cases:
        kept = cut(np.array(choices), excess)
        assert sorted(kept.tolist()) == sorted(expected)
