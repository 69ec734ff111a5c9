"""No text is lost without a word: what is left out is named, in corpus.json too, and beyond a share it is an error."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moefoundry.cli.prepare import describe
from moefoundry.config.errors import UserError
from moefoundry.data import corpus as corpus_module
from moefoundry.data import opening
from moefoundry.data import prepare as prepare_module
from moefoundry.data.left_out import LeftOut, Reason, one_line
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.reading import BadBytes
from moefoundry.data.summary import read_corpus_summary


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    """Forty files of 2,000 bytes."""
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"line {number:02d} of words\n" * 105)
    return PrepareOptions(str(tmp_path / "in"), tmp_path / "out", max_seq_len=32, vocab_size=300, val_fraction=0.2)


def test_one_bad_byte_and_a_utf_16_file_cost_a_line(options: PrepareOptions) -> None:
    source = Path(options.source)
    bad = source / "00.txt"
    bad.write_bytes(bad.read_bytes().replace(b"line", b"lin\xe9", 1))
    (source / "01.txt").write_bytes((source / "01.txt").read_text().encode("utf-16"))
    prepared = prepare(options)
    corpus = prepared.corpus
    assert corpus.left_out == {"not UTF-8": {"count": 1, "bytes": 17, "first": ["00.txt:1"]}}
    assert sum(split.bytes for split in corpus.splits.values()) == 40 * 105 * 17 - 17
    assert corpus.left_out_share == pytest.approx(1 / (40 * 105))
    assert read_corpus_summary(options.out) == corpus
    for shown in (describe(prepared), describe(prepare(options))):
        assert "left out, 0.02% of the bytes: 1 not UTF-8 (17 bytes: 00.txt:1)" in shown


def test_more_than_a_hundredth_is_an_error_unless_allowed(options: PrepareOptions) -> None:
    source = Path(options.source)
    (source / "00.txt").write_bytes(b"caf\xe9\n" * 500)
    (source / "01.txt").write_bytes(b"\x89PNG\0\0\xff" * 10)
    with pytest.raises(UserError) as raised:
        prepare(options)
    message = str(raised.value)
    assert "3.65% of its bytes would be left out, and 1.00% may be: " in message
    assert "500 not UTF-8 (2,500 bytes: 00.txt:1, 00.txt:2, 00.txt:3, ...)" in message
    assert "1 not text (70 bytes: 01.txt)" in message
    assert "bad_bytes=replace keeps such lines" in message
    assert message.endswith("or allow it: max_loss=0.037")
    assert "\n" not in message
    assert not options.out.exists()
    assert prepare(replace(options, max_loss=0.037)).corpus.skipped == 502
    replaced = replace(options, bad_bytes=BadBytes.replace, overwrite=True)
    assert prepare(replaced).corpus.left_out.keys() == {"not text"}


def test_a_loss_of_unknown_size_is_allowed_only_where_any_is(options: PrepareOptions) -> None:
    (Path(options.source) / "gone.txt").symlink_to("nowhere")
    unknown = r"an unknown share of its bytes .*: 1 a link to nothing \(size unknown: gone\.txt\); mend .*max_loss=1$"
    with pytest.raises(UserError, match=unknown):
        prepare(replace(options, max_loss=0.9))
    assert prepare(replace(options, max_loss=1.0)).corpus.left_out_share is None


def test_a_file_without_permission_is_named(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    open_bytes = corpus_module.open_bytes  # the tests may run as root, who can read everything

    def refuse(file: Path) -> BinaryIO:
        if file.name == "07.txt":
            raise PermissionError(13, "Permission denied", str(file))
        return open_bytes(file)

    monkeypatch.setattr(corpus_module, "open_bytes", refuse)
    with pytest.raises(UserError, match=r"2\.50% of its bytes .*: 1 not readable \(1,785 bytes: 07\.txt\)"):
        prepare(options)
    assert prepare(replace(options, max_loss=0.03)).corpus.left_out_share == 1 / 40


def test_places_without_permission_are_one_line(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(place))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(UserError, match=r"in: cannot be read: Permission denied$"):
            prepare(options)
    with monkeypatch.context() as patch:
        patch.setattr(opening, "load_tokenizer", lambda place: refuse(place / "tokenizer.json"))
        with pytest.raises(UserError, match=r"given/tokenizer\.json: Permission denied$"):
            prepare(replace(options, tokenizer=Path("given")))
    long = "x" * 300
    with pytest.raises(UserError, match=rf"{long}: file name too long"):
        prepare(replace(options, source=long))
    with pytest.raises(UserError, match=rf"{long}: File name too long"):
        prepare(replace(options, out=Path(long)))


def test_blank_files_and_pipes_are_named_and_cost_nothing(options: PrepareOptions) -> None:
    os.mkfifo(Path(options.source) / "pipe.txt")
    (Path(options.source) / "blank.txt").write_text("\n" * 100_000)
    corpus = prepare(options).corpus
    assert corpus.left_out.keys() == {"blank", "not a regular file"}
    assert corpus.left_out_share == 0.0


def test_nothing_that_could_be_read_offers_no_leave(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n' * 30)
    with pytest.raises(UserError, match=r"100\.00% .* has strings at body: name the one that is text: text_key=\S+$"):
        prepare(replace(options, source=str(tmp_path / "x.jsonl")))


def test_a_corpus_that_changes_while_it_is_read_is_refused(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = prepare_module._survey

    def scan_then_grow(*args):
        found = scan(*args)
        with (Path(options.source) / "20.txt").open("a") as file:
            file.write("and more\n")
        return found

    monkeypatch.setattr(prepare_module, "_survey", scan_then_grow)
    with pytest.raises(UserError, match="in: changed while it was read"):
        prepare(options)
    assert not options.out.exists()


def test_the_smallest_leave_is_named() -> None:
    for kept in (1, 10, 99, 1000, 12345):
        left_out = LeftOut()
        left_out.add("x", Reason.null, 100)
        with pytest.raises(UserError) as raised:
            left_out.check("corpus", kept, 0.001, "")
        left_out.check("corpus", kept, float(str(raised.value).rpartition("=")[2]), "")


def test_old_summaries_are_read(options: PrepareOptions) -> None:
    prepare(options)
    file = options.out / "corpus.json"
    record = json.loads(file.read_text())
    for name in ("left_out", "left_out_share", "division"):
        del record[name]
    file.write_text(json.dumps(record | {"skipped": 3}))
    again = prepare(options)
    assert again.up_to_date
    assert "left out: 3 blank or not UTF-8" in describe(again)


def test_names_are_printed_in_one_line() -> None:
    assert one_line("a\nb\t\udcff漢.txt") == "a\\nb\\t\\udcff漢.txt"


def test_text_that_a_given_tokenizer_does_not_know_is_counted(options: PrepareOptions, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    vocabulary = {"<unk>": 0, "<end>": 1, "line": 2, "of": 3}
    for unknown, eos, count in [("<unk>", "<end>", 2), ("<end>", "<end>", 0)]:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(given / "tokenizer.json"))
        (given / "tokenizer_config.json").write_text(f'{{"eos_token": "{eos}"}}')
        prepared = prepare(replace(options, tokenizer=given, overwrite=True))
        shares = [split.unknown_tokens / (32 * split.samples) for split in prepared.corpus.splits.values()]
        assert shares == pytest.approx([count / 4] * 2, abs=0.01), "of each line two words of four are known"
        assert ("unknown to the tokenizer: the text of " in describe(prepared)) == bool(count)
        assert read_corpus_summary(options.out) == prepared.corpus
