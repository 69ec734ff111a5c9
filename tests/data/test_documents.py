"""The layout of documents: one sample each, of any length, and packed when they are read."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset

from moefoundry.cli.main import main
from moefoundry.config.errors import UserError
from moefoundry.data.corpus import open_corpus
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.splits import split_of
from moefoundry.data.summary import Layout, read_corpus_summary
from moefoundry.data.tokenizer import load_tokenizer


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    root = tmp_path / "in"
    root.mkdir()
    for number in range(40):
        (root / f"{number:02d}.txt").write_text(f"line {number} of a text\n" * (number % 7 + 1))
    return PrepareOptions(str(root), tmp_path / "out", vocab_size=300, val_fraction=0.2, layout=Layout.documents)


def read_documents(directory: Path) -> list[np.ndarray]:
    """By mosaicml-streaming's own reader."""
    return [sample["tokens"] for sample in LocalDataset(str(directory))]


def test_documents_are_samples_with_their_lengths_beside(options: PrepareOptions) -> None:
    summary = prepare(options).corpus
    assert summary == read_corpus_summary(options.out)
    assert (summary.format_version, summary.layout, summary.max_seq_len) == (2, "documents", None)
    tokenizer = load_tokenizer(options.out / "tokenizer")
    documents = list(open_corpus(options.source).documents())
    for name, split in summary.splits.items():
        mine = [d.text for d in documents if split_of(d, 0.2, options.seed).value == name]
        expected = [[*ids.tolist(), summary.eos_id] for ids in tokenizer.encode_batch(mine)]
        written = read_documents(options.out / name)
        assert all(document.dtype == np.uint16 for document in written)
        assert [document.tolist() for document in written] == expected
        lengths = np.load(options.out / name / "lengths.npy")
        assert lengths.dtype == np.int32
        assert lengths.tolist() == [len(ids) for ids in expected]
        content = (options.out / name / "lengths.npy").read_bytes()
        assert split.lengths_sha256 == hashlib.sha256(content).hexdigest()
        assert split.samples == split.documents == len(expected) > 0
        assert (split.tokens, split.dropped_tokens) == (sum(map(len, expected)), 0)


def test_documents_in_order_are_the_packed_samples(options: PrepareOptions, tmp_path: Path) -> None:
    documents = prepare(options).corpus
    packed = prepare(replace(options, out=tmp_path / "packed", layout=Layout.packed, max_seq_len=16)).corpus
    assert packed.tokenizer_sha256 == documents.tokenizer_sha256
    for name in ("train", "val"):
        stream = np.concatenate(read_documents(options.out / name))
        samples = np.stack(read_documents(tmp_path / "packed" / name))
        assert (samples == stream[: samples.size].reshape(samples.shape)).all()


def test_a_layout_is_not_taken_for_the_other(options: PrepareOptions, tmp_path: Path) -> None:
    prepare(options)
    assert prepare(options).up_to_date
    with pytest.raises(UserError, match=r"out: holds documents, .* and packed samples are asked for; without max_seq"):
        prepare(replace(options, layout=Layout.packed))
    packed = replace(options, out=options.out.with_name("packed"), layout=None, max_seq_len=32)
    prepare(packed)
    before = {file: file.stat().st_mtime_ns for file in packed.out.rglob("*")}
    with pytest.raises(
        UserError, match=r"packed: holds samples packed to 32 tokens, .* max_seq_len=32 keeps them, over"
    ):
        prepare(replace(packed, max_seq_len=None, source=str(tmp_path / "not read")))
    assert {file: file.stat().st_mtime_ns for file in packed.out.rglob("*")} == before
    assert prepare(packed).up_to_date
    assert prepare(replace(packed, max_seq_len=None, overwrite=True)).corpus.layout is Layout.documents
    (options.out / "val" / "lengths.npy").unlink()
    with pytest.raises(UserError, match=r"val/lengths\.npy \(missing there\)"):
        prepare(options)


def test_the_command_line_makes_documents_by_default(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prepare", options.source, str(options.out), "--vocab-size=300"]
    assert main([*line, "--layout=documents", "--max-seq-len=32"]) == 2
    assert "--max-seq-len 32: not with --layout documents" in capsys.readouterr().err
    assert main(line) == 0
    assert "out: prepared (vocabulary 300, documents)" in capsys.readouterr().out
