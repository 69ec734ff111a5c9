"""`moefoundry prepare`: what it writes, that it repeats exactly, and that bad input leaves nothing behind."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming import StreamingDataLoader
from streaming.base.format import reader_from_json
from tokenizers import Tokenizer, models, pre_tokenizers

from moefoundry.cli.main import main
from moefoundry.cli.prepare import describe
from moefoundry.config.errors import UserError
from moefoundry.data import prepare as prepare_module
from moefoundry.data.assembly import unigram_entropy
from moefoundry.data.corpus import open_corpus
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.splits import split_of
from moefoundry.data.summary import read_corpus_summary
from moefoundry.data.tokenizer import load_tokenizer, train_tokenizer
from tests.data.shards import config_of, tokens_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty small files; seed 17 holds out some of them at the fraction below."""
    root = tmp_path / "source"
    root.mkdir()
    for number in range(40):
        (root / f"file{number:02d}.py").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 6)
    return root


@pytest.fixture
def options(source: Path, tmp_path: Path) -> PrepareOptions:
    return PrepareOptions(str(source), tmp_path / "out", max_seq_len=32, vocab_size=300, val_fraction=0.2)


def read_split(directory: Path) -> list[np.ndarray]:
    shards = json.loads((directory / "index.json").read_text())["shards"]
    readers = [reader_from_json(str(directory), "", shard) for shard in shards]
    return [reader[index]["tokens"] for reader in readers for index in range(len(reader))]


def tree(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_token_is_accounted_for(options: PrepareOptions) -> None:
    summary = prepare(options).corpus
    assert summary == read_corpus_summary(options.out)
    tokenizer = load_tokenizer(options.out / "tokenizer")
    assert (summary.vocab_size, summary.tokenizer_sha256) == (300, tokenizer.sha256)

    documents = list(open_corpus(options.source).documents())
    assert sum(split.documents for split in summary.splits.values()) == len(documents) == 40
    for name, split in summary.splits.items():
        mine = [d for d in documents if split_of(d, options.val_fraction, options.seed).value == name]
        stream = [token for d in mine for token in [*tokenizer.encode_batch([d.text])[0].tolist(), summary.eos_id]]
        assert split.documents == len(mine) > 0
        assert split.bytes == sum(len(d.text.encode()) for d in mine)
        assert split.tokens == len(stream)
        assert split.dropped_tokens == len(stream) % 32
        written = read_split(options.out / name)
        assert len(written) == split.samples == len(stream) // 32
        assert all(sample.shape == (32,) and sample.dtype == np.uint16 for sample in written)
        flat = np.concatenate(written)
        assert flat.tolist() == stream[: split.samples * 32]
        assert split.unigram_entropy_nats == pytest.approx(unigram_entropy(np.bincount(flat)))


def test_no_document_is_in_both_splits(options: PrepareOptions) -> None:
    prepare(options)
    tokenizer = load_tokenizer(options.out / "tokenizer").backend
    names = {
        split: {
            word for sample in read_split(options.out / split) for word in tokenizer.decode(sample.tolist()).split()
        }
        for split in ("train", "val")
    }
    seen = {split: {word for word in words if word.startswith("function_")} for split, words in names.items()}
    whole = {split: {word for word in words if word.endswith("(value):")} for split, words in seen.items()}
    assert whole["train"]
    assert whole["val"]
    assert not whole["train"] & whole["val"]


def test_unigram_entropy_by_hand() -> None:
    # probabilities 1/2, 1/4, 1/4, 0: entropy 1.5 bits
    assert unigram_entropy(np.array([2, 1, 1, 0])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([7, 0])) == 0.0
    assert unigram_entropy(np.array([0, 0])) == 0.0


def test_shards_carry_hashes_and_are_cut_to_size(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 2048)
    prepare(options)
    shards = json.loads((options.out / "train" / "index.json").read_text())["shards"]
    assert len(shards) > 2
    for shard in shards:
        content = (options.out / "train" / shard["raw_data"]["basename"]).read_bytes()
        assert shard["raw_data"]["hashes"]["sha1"] == hashlib.sha1(content).hexdigest()
        assert set(shard["raw_data"]["hashes"]) == {"sha1", "xxh64"}


def test_two_runs_write_the_same_bytes(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(options)
    monkeypatch.setattr(prepare_module, "ENCODE_BATCH_BYTES", 100)  # nor does the batching matter
    prepare(replace(options, out=tmp_path / "again"))
    assert tree(tmp_path / "again") == tree(options.out)


def test_repeating_does_nothing_and_changes_are_refused(options: PrepareOptions, source: Path) -> None:
    first = prepare(options)
    before = {file: file.stat().st_mtime_ns for file in options.out.rglob("*")}
    second = prepare(options)
    assert (first.up_to_date, second.up_to_date) == (False, True)
    assert second.corpus == first.corpus

    refused = r"out: holds another corpus; differs in max_seq_len \(32 there, 16 now\), seed \(17 there, 18 now\);"
    with pytest.raises(UserError, match=refused):
        prepare(replace(options, max_seq_len=16, seed=18))
    (source / "file00.py").write_text("changed = True\n")
    with pytest.raises(UserError, match=r"differs in bytes \(.*\), documents_sha256 \(.*overwrite=True"):
        prepare(options)
    assert {file: file.stat().st_mtime_ns for file in options.out.rglob("*")} == before

    assert prepare(replace(options, max_seq_len=16, overwrite=True)).corpus.max_seq_len == 16
    assert sorted(entry.name for entry in options.out.parent.iterdir()) == ["out", "source"]


def test_incomplete_or_foreign_directories_are_not_taken_for_a_corpus(options: PrepareOptions) -> None:
    options.out.mkdir()
    prepare(options)  # an empty directory is as good as none
    (options.out / "val" / "index.json").unlink()
    with pytest.raises(UserError, match=r"val/index\.json \(missing there\)"):
        prepare(options)
    (options.out / "notes").write_text("mine")
    with pytest.raises(UserError, match="not overwritten, as it also holds notes"):
        prepare(replace(options, overwrite=True))
    (options.out / "notes").unlink()
    (options.out / "corpus.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format version 99"):
        prepare(options)
    (options.out / "corpus.json").unlink()
    with pytest.raises(UserError, match="exists and is not a prepared corpus"):
        prepare(replace(options, overwrite=True))


def test_given_tokenizer_is_copied_and_wide_vocabularies_fit(options: PrepareOptions, tmp_path: Path) -> None:
    given = Tokenizer(models.WordLevel({"?": 0, "def": 1, "</s>": 70_000}, unk_token="?"))
    given.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "given").mkdir()
    given.save(str(tmp_path / "given" / "tokenizer.json"))
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    summary = prepare(replace(options, tokenizer=tmp_path / "given")).corpus
    assert (summary.vocab_size, summary.eos_token, summary.eos_id) == (70_001, "</s>", 70_000)
    assert tree(options.out / "tokenizer") == tree(tmp_path / "given")
    written = np.concatenate(read_split(options.out / "val"))
    assert written.dtype == np.uint32
    assert set(written.tolist()) == {0, 1, 70_000}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere/at/all"}, "nowhere/at/all: no such file or directory"),
        (
            {"max_docs": 1, "max_seq_len": 800},
            r"no sample for train( and val)?: 1 document\(s\)",
        ),
        (
            {"max_seq_len": 10_000},
            "no sample for train and val: .* max_seq_len=10000; .*: val_fraction=0",
        ),
        ({"max_seq_len": 10_000, "val_fraction": 0}, "no sample for train: .* max_seq_len=10000; add text, or lower"),
        ({"source": "s3://user:secret@bucket/text"}, r"^s3://\.\.\.: not a local path; copy the corpus"),
        ({"out": Path("s3://user:secret@bucket/text")}, r"^s3://\.\.\.: a URL is given as a string"),
        ({"max_loss": 1.5}, r"max_loss=1\.5: a share, from 0 to 1"),
        ({"max_bytes": 1}, "empty corpus: no document with text .* within max_bytes=1"),
        ({"tokenizer": Path("no/tokenizer")}, r"no/tokenizer/tokenizer\.json: no such file"),
        ({"max_vocab": 299}, "vocab_size=300 exceeds max_vocab=299"),
        ({"max_seq_len": 1}, "max_seq_len=1: at least 2"),
        ({"val_fraction": 1.0}, r"val_fraction=1\.0: at least 0 .* below 1"),
        ({"vocab_size": 100}, "vocab_size=100: at least 261"),
        ({"max_docs": 0}, "max_docs=0: at least 1"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(options: PrepareOptions, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        prepare(replace(options, **change))
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in options.out.parent.iterdir()] == ["source"]


def test_given_vocabulary_above_the_limit_is_named(options: PrepareOptions, tmp_path: Path) -> None:
    train_tokenizer(["x"], 261).save(tmp_path / "given")
    with pytest.raises(UserError, match=r"given: the tokenizer's vocabulary of 261 exceeds max_vocab=260"):
        prepare(replace(options, tokenizer=tmp_path / "given", max_vocab=260))
    assert not options.out.exists()


def test_blank_files_are_an_empty_corpus(options: PrepareOptions, source: Path) -> None:
    for file in source.iterdir():
        file.write_text(" \n")
    with pytest.raises(UserError, match=r"empty corpus: no document with text in 40 file\(s\) \(left out: 40 bl"):
        prepare(options)


def test_out_that_cannot_be_made_is_named(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        prepare(replace(options, out=tmp_path / "file" / "out"))
    with pytest.raises(UserError, match="file: exists and is not a prepared corpus"):
        prepare(replace(options, out=tmp_path / "file", overwrite=True))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: cannot be written"):
        prepare(replace(options, out=tmp_path / "loop"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_things_as_they_were(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        prepare(options)
    before = tree(options.out.parent)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.CorpusSummary, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(options, max_seq_len=16, overwrite=overwrite))
    assert tree(options.out.parent) == before
    assert options.out.exists() == overwrite


def test_a_failed_rename_puts_the_old_corpus_back(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(options)
    before = tree(options.out.parent)
    rename = Path.rename

    def refuse_staging(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(1, "not today", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_staging)
    with pytest.raises(UserError, match=r"out: cannot be written: .*not today"):
        prepare(replace(options, max_seq_len=16, overwrite=True))
    assert tree(options.out.parent) == before


@pytest.mark.parametrize("place", ["of d#1%20?x&y=z", "größe 漢 [1]*", "a:b", "'quoted' \\"])
def test_any_path_will_do(tmp_path: Path, place: str, build: Callable[..., StreamingDataLoader]) -> None:
    source, out = tmp_path / place / "in", tmp_path / place / "out"
    source.mkdir(parents=True)
    for number in range(30):
        (source / f"{number} {place}.txt").write_text(f"line {number} of text\n" * 20)
    options = PrepareOptions(str(source), out, max_seq_len=16, vocab_size=280, val_fraction=0.2)
    summary = prepare(options).corpus
    loader = build(config_of(out))
    assert len(tokens_of(loader)) == summary.splits["train"].samples // 4
    again = prepare(replace(options, tokenizer=out / "tokenizer", overwrite=True))
    assert again.corpus.sha256 == summary.sha256


def test_a_name_that_is_not_utf_8(source: Path, options: PrepareOptions) -> None:
    name = os.fsdecode(b"caf\xe9.py")
    (source / name).write_bytes(b"x = 1\ny = '\xe9'\n")
    prepared = prepare(replace(options, max_loss=0.1))
    assert prepared.corpus.left_out["not UTF-8"]["first"] == [f"{name}:2"]
    assert "caf\\udce9.py:2" in describe(prepared)
    assert prepare(replace(options, max_loss=0.1)).up_to_date


def test_home_is_expanded(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first = prepare(replace(options, source="~/source", out=Path("~/first")))
    assert (tmp_path / "first" / "corpus.json").is_file()
    prepare(replace(options, source="~/source", out=Path("~/deep/second"), tokenizer=Path("~/first/tokenizer")))
    assert not (tmp_path / "~").exists()
    assert first.out == tmp_path / "first"
    with pytest.raises(UserError, match="~nobody-has-this-name/x: no such file or directory"):
        prepare(replace(options, source="~nobody-has-this-name/x"))


def test_the_command_prints_a_summary(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prepare", str(source), str(tmp_path / "out"), "--max-seq-len=32", "--vocab-size=300", "--val-fraction=.2"]
    for state in ("prepared", "up to date"):
        assert main(line) == 0
        out = capsys.readouterr().out
        assert f"out: {state} (vocabulary 300, samples of 32 tokens)" in out
        assert "unigram entropy" in out
        assert "train" in out
        assert "val" in out
