"""Every split that is asked for has a sample."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streaming import StreamingDataLoader

from moefoundry.config.errors import UserError
from moefoundry.data.corpus import Document
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.splits import Division, Split, by_position, moved, split_of
from moefoundry.data.summary import CorpusSummary
from moefoundry.data.tokenizer import load_tokenizer
from tests.data.shards import config_of, tokens_of
from tests.data.test_prepare import read_split


def corpus_of(root: Path, texts: list[str], **options) -> CorpusSummary:
    root.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (root / f"{number:02d}.txt").write_text(text)
    options = {"max_seq_len": 32, "vocab_size": 300} | options
    return prepare(PrepareOptions(str(root), root.parent / "out", **options)).corpus


def text_of(corpus: Path, split: str) -> str:
    tokens = np.concatenate(read_split(corpus / split))
    return load_tokenizer(corpus / "tokenizer").backend.decode(tokens.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("val_fraction", [0.001, 0.05, 0.5, 0.99])
def test_a_lone_document_is_split_by_position(tmp_path: Path, val_fraction: float) -> None:
    lines = [f"line {number} of the only text\n" for number in range(400)]
    summary = corpus_of(tmp_path / "in", ["".join(lines)], val_fraction=val_fraction)
    train, val = summary.splits["train"], summary.splits["val"]
    assert train.samples > 0
    assert val.samples > 0
    assert train.bytes + val.bytes == sum(map(len, lines))
    if val_fraction in (0.05, 0.5):
        assert val.bytes / (train.bytes + val.bytes) == pytest.approx(val_fraction, abs=0.01)
    assert "".join(lines).startswith(text_of(tmp_path / "out", "train")[:200])
    start = text_of(tmp_path / "out", "val")[:40]
    assert start.startswith("line "), "not cut at a line break"
    assert prepare(
        PrepareOptions(str(tmp_path / "in"), tmp_path / "out", 32, 300, val_fraction=val_fraction)
    ).up_to_date


def test_few_documents_are_never_cut(tmp_path: Path) -> None:
    """By chance none of these files, or all of them, would be held out."""
    for count, seed in ((14, 17), (20, 3), (50, 5)):
        root = tmp_path / f"{count}"
        texts = [f"file {number} {'of a few words ' * 12}\n" for number in range(count)]
        for val_fraction in (0.001, 0.98):
            summary = corpus_of(root, texts, seed=seed, val_fraction=val_fraction, overwrite=True)
            assert all(split.samples for split in summary.splits.values())
            assert sum(split.documents for split in summary.splits.values()) == count
            assert summary.division["train_bytes"] is None


def test_a_split_that_chance_fills_is_left_as_it_is(tmp_path: Path) -> None:
    summary = corpus_of(tmp_path / "in", [f"{number} {'words ' * 60}" for number in range(40)], val_fraction=0.2)
    assert summary.division == {"val_fraction": 0.2, "train_bytes": None}


def test_nothing_is_held_out_on_request(tmp_path: Path, build: Callable[..., StreamingDataLoader]) -> None:
    summary = corpus_of(tmp_path / "in", ["words " * 100], val_fraction=0)
    assert list(summary.splits) == ["train"]
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["corpus.json", "tokenizer", "train"]
    assert prepare(PrepareOptions(str(tmp_path / "in"), tmp_path / "out", 32, 300, val_fraction=0)).up_to_date
    with pytest.raises(UserError, match=r"no split 'val'; it has train.*eval_loader=null"):
        build(config_of(tmp_path / "out", "val", max_seq_len=32), model_vocab_size=300)
    loader = build(config_of(tmp_path / "out", max_seq_len=32), batch_size=1, model_vocab_size=300)
    assert len(tokens_of(loader)) == summary.splits["train"].samples > 0


def test_unequal_documents(tmp_path: Path) -> None:
    """One long document and two that fill no sample: no division by document, so the long one is cut."""
    summary = corpus_of(tmp_path / "in", ["tiny", "a b c d " * 400, "small"], val_fraction=0.3)
    assert all(split.samples for split in summary.splits.values())
    assert summary.division["train_bytes"] is not None


def documents(count: int) -> list[Document]:
    return [Document(f"{number}", "ab\n" * 10, f"{number}") for number in range(count)]


def test_the_share_is_moved_as_little_as_is_needed() -> None:
    few = documents(20)
    held_out = [document for document in few if split_of(document, 0.2, 0) is Split.val]
    division = moved(few, 0.2, 0, needed_bytes=30 * len(held_out) + 1)
    assert division is not None
    assert sum(split is Split.val for split, _ in division.divide(few, 0)) == len(held_out) + 1
    assert moved(few, 0.2, 0, needed_bytes=301) is None
    same = [document._replace(split_key="same") for document in few]  # records with one text are never parted
    assert moved(same, 0.2, 0, needed_bytes=1) is None


def test_a_cut_by_position_parts_the_text(tmp_path: Path) -> None:
    for text in ("ab\n" * 50, "abc" * 50, "漢字" * 25):
        whole = [Document("a", text, "a"), Document("b", text, "b")]
        total = 2 * len(text.encode())
        for val_fraction in (0.1, 0.5, 0.8):
            division = by_position(total, val_fraction, 10)
            divided = list(division.divide(whole, 0))
            train, val = ([document for own, document in divided if own is split] for split in Split)
            later = list(division.divide(whole[1:], 0, position=total // 2))  # as the block of the second sees it
            assert later == [item for item in divided if item[1].doc_id == "b"]
            assert "".join(document.text for document in (*train, *val)) == 2 * text
            held_out = len("".join(document.text for document in val).encode()) / total
            assert held_out == pytest.approx(val_fraction, abs=0.05)
    assert by_position(1000, 0.01, 100) == Division(0.1, 900)
    assert by_position(1000, 0.99, 100) == Division(0.9, 100)
    assert by_position(150, 0.01, 100) == Division(0.5, 75)


def test_the_division_is_recorded(tmp_path: Path) -> None:
    corpus_of(tmp_path / "in", ["one line of words\n" * 100])
    record = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert record["division"]["train_bytes"] == pytest.approx(0.95 * 1800, abs=60)
