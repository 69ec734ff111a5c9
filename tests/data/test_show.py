"""``moefoundry data show``: samples of both layouts as text."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moefoundry.cli.main import main
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.show import Bin, Part, Sample, Span, SplitView, histogram
from moefoundry.data.summary import Layout


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"text {number}" + " and more" * (number % 5))
    options = PrepareOptions(str(tmp_path / "in"), tmp_path / "out", vocab_size=300, val_fraction=0.2)
    return replace(options, layout=Layout.documents)


def test_documents_are_shown_with_their_ends(options: PrepareOptions, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = prepare(options).corpus
    capsys.readouterr()
    assert main(["data", "show", str(options.out), "-n", "2", "--split", "val"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sample 0 of val: ")
    assert out.count("<|endoftext|>\n") == 2
    assert "\x1b" not in out
    assert f"val: {corpus.splits['val'].documents:,} documents, {corpus.splits['val'].tokens:,} tokens" in out
    assert main(["data", "show", str(options.out), "--json", "-n", "1", "--skip", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["shown"][0]["spans"][0]["text"].startswith("text 1")
    lengths = np.load(options.out / "train" / "lengths.npy")
    assert sum(each["documents"] for each in record["lengths"]) == len(lengths) == record["documents"]


def test_packed_samples_are_shown(options: PrepareOptions, capsys: pytest.CaptureFixture[str]) -> None:
    summary = prepare(replace(options, layout=Layout.packed, max_seq_len=16)).corpus.splits["train"]
    view = SplitView.open(options.out, "train")
    assert view.lengths().sum() == 16 * summary.samples
    capsys.readouterr()
    assert main(["data", "show", str(options.out), "-n", "1", "--max-tokens", "5"]) == 0
    assert " ... and 11 tokens more\n" in capsys.readouterr().out


def test_parts_and_ignored_targets(options: PrepareOptions) -> None:
    prepare(options)
    view = SplitView.open(options.out, "train")
    texts = ["<fim_begin>", "a", "<fim_hole>", "b", "<fim_end>", "c", "<|endoftext|>", "d"]
    tokens = np.array([view.backend.token_to_id(text) for text in texts])
    targets = np.array([0, 0, 0, 0, 0, 1, 1, 1], np.uint8)
    parts = [Part.sentinel, Part.prefix, Part.sentinel, Part.suffix, Part.sentinel, Part.middle, Part.border, Part.text]
    expected = [Span(text, part, not target) for text, part, target in zip(texts, parts, targets, strict=True)]
    assert view.spans(Sample(tokens, targets)) == expected
    assert not any(span.ignored for span in view.spans(Sample(tokens, None)))


def test_text_does_not_control_the_terminal(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in Path(options.source).iterdir():
        file.write_text("red \x1b[31m bell \a\n")
    prepare(options)
    capsys.readouterr()
    assert main(["data", "show", str(options.out), "-n", "1"]) == 0
    assert "red \\x1b[31m bell \\x07\n" in capsys.readouterr().out
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["data", "show", str(options.out), "-n", "1"]) == 0
    assert "\x1b[30m\x1b[43m<|endoftext|>\x1b[0m" in terminal.getvalue()


def test_lengths_by_powers_of_two() -> None:
    assert histogram(np.array([3, 4, 7, 8, 40])) == [
        Bin(2, 3, 1),
        Bin(4, 7, 2),
        Bin(8, 15, 1),
        Bin(16, 31, 0),
        Bin(32, 63, 1),
    ]
    assert histogram(np.array([1])) == [Bin(1, 1, 1)]


def test_a_split_that_there_is_not(options: PrepareOptions, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(options)
    (options.out / "val" / "shard.00000.00000.mds").unlink()
    assert main(["data", "show", str(options.out), "--split", "test"]) == 2
    assert "out: no split 'test'; it has train, val" in capsys.readouterr().err
    assert main(["data", "show", str(options.out), "--split", "val"]) == 2
    assert "shard.00000.00000.mds: cannot be read" in capsys.readouterr().err
