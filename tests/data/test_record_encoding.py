"""``prepare`` on records of instructions and preferences: what is stored, and what is left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from streaming import LocalDataset

from moefoundry.config.errors import UserError
from moefoundry.data import prepare as preparation
from moefoundry.data.instructions import TargetResponses, Targets, TooLong, encode_record, load_chat_tokenizer
from moefoundry.data.options import Kind, Part, PrepareOptions
from moefoundry.data.parts import merge_parts, prepare_part
from moefoundry.data.preferences import encode_preference
from moefoundry.data.prepare import PreparedSummary, prepare
from moefoundry.data.summary import LENGTHS_FILE
from moefoundry.data.tokenizer import train_tokenizer

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} + {n}?"},
            {"role": "assistant", "content": f"{2 * n}"},
            {"role": "user", "content": "And again?"},
            {"role": "assistant", "content": f"{2 * n}, as I said."},
        ]
    }
    for n in range(12)
]
PLAIN = [{"prompt": f"Twice {n} is ", "response": f"{2 * n}", "source": "made"} for n in range(8)]
BAD = [{"prompt": "no response"}, {"messages": CHATS[0]["messages"][:1]}]
PAIRS = [{"prompt": f"Twice {n} is ", "chosen": f"{2 * n}", "rejected": f"{2 * n + 1}"} for n in range(10)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("tokenizers") / "trained"
    train_tokenizer([json.dumps([CHATS, PLAIN])], 300).save(directory)
    return directory


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def stored(prepared: PreparedSummary, *splits: str) -> list[tuple[list[int], list[int]]]:
    samples = [sample for split in splits for sample in LocalDataset(str(prepared.out / split))]
    return [(sample["tokens"].tolist(), sample["targets"].tolist()) for sample in samples]


def expected(records: list[Any], tokenizer: Path, targets: Targets) -> list[tuple[list[int], list[int]]]:
    chat = load_chat_tokenizer(tokenizer)
    encoded = [encode_record(record, chat, targets) for record in records]
    return [(each.tokens.tolist(), each.targets.tolist()) for each in encoded]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_records_are_stored_as_they_are_encoded(tokenizer: Path, tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"chats.{suffix}"
    if suffix == "jsonl":
        write(source, [*CHATS, *PLAIN])
    else:
        pa.parquet.write_table(pa.Table.from_pylist(CHATS), source)
    records = [*CHATS, *PLAIN] if suffix == "jsonl" else CHATS
    options = {"tokenizer": tokenizer, "kind": Kind.instructions, "val_fraction": 0.2, "workers": 1}
    options["target_responses"] = TargetResponses.all
    prepared = prepare(PrepareOptions(str(source), tmp_path / "out", **options))
    found = stored(prepared, "train", "val")
    assert sorted(found) == sorted(expected(records, tokenizer, Targets(TargetResponses.all)))
    assert {name: split.documents for name, split in prepared.corpus.splits.items()} != {"train": len(records)}
    lengths = np.load(tmp_path / "out/train" / LENGTHS_FILE)
    assert lengths.tolist() == [len(tokens) for tokens, _ in stored(prepared, "train")]
    assert prepare(PrepareOptions(str(source), tmp_path / "out", **options)).up_to_date
    with pytest.raises(UserError, match=r"differs in target_responses \(all there, last now\)"):
        prepare(PrepareOptions(str(source), tmp_path / "out", **options | {"target_responses": TargetResponses.last}))


def test_any_number_of_processes_gives_the_same(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "chats.jsonl", [*CHATS, *BAD[:1], *CHATS])
    monkeypatch.setattr(preparation, "BLOCK_BYTES", 900)
    made = []
    for workers in (1, 2):
        options = PrepareOptions(source, tmp_path / f"{workers}", tokenizer=tokenizer, kind=Kind.instructions)
        made.append(prepare(PrepareOptions(**{**vars(options), "workers": workers, "max_loss": 0.5})).corpus)
    assert made[0].sha256 == made[1].sha256
    assert made[0].left_out == made[1].left_out
    message = "chats.jsonl:13 (it has neither messages nor response nor completion)"
    assert made[0].left_out["no such record"]["first"] == [message]


def test_bad_records_are_counted_and_more_than_allowed_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", [*PLAIN, *BAD])
    options = {"tokenizer": tokenizer, "kind": Kind.instructions, "val_fraction": 0.0, "workers": 1}
    with pytest.raises(UserError, match=r"would be left out.*no such record.*chats.jsonl:9 \(it has neither"):
        prepare(PrepareOptions(source, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
    write(tmp_path / "chats.jsonl", [*PLAIN, *BAD, "text"])
    corpus = prepare(PrepareOptions(source, tmp_path / "out", **options, max_loss=1.0)).corpus
    assert {reason: left["count"] for reason, left in corpus.left_out.items()} == {
        "no such record": 2,
        "not a JSON object": 1,
    }
    assert corpus.splits["train"].documents == len(PLAIN)


def test_why_nothing_is_left_is_said(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", BAD)
    options = PrepareOptions(source, tmp_path / "out", tokenizer=tokenizer, kind=Kind.instructions, val_fraction=0)
    with pytest.raises(
        UserError, match=r"100.00% of its bytes would be left out, .*: 2 no such record \(.*chats.jsonl:1 "
    ):
        prepare(options)
    with pytest.raises(UserError, match=r"no sample for train: .* \(left out: 2 no such record \(.*chats.jsonl:1 \("):
        prepare(replace(options, max_loss=1.0))


@pytest.mark.parametrize("kind", [Kind.instructions, Kind.preferences])
def test_parts_of_records_are_the_whole(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(preparation, "BLOCK_BYTES", 320)
    source = write(tmp_path / "in.jsonl", [*CHATS, *BAD, *PLAIN] if kind is Kind.instructions else PAIRS)
    options = PrepareOptions(source, tmp_path / "out", tokenizer=tokenizer, kind=kind, workers=0)
    options = replace(options, val_fraction=0.5, max_loss=0.5)
    prepare(replace(options, out=tmp_path / "whole"))
    for number in (2, 3, 1):
        prepare_part(options, Part(number, 3))
    merge_parts(options.out)
    files = [path.relative_to(options.out) for path in sorted(options.out.rglob("*")) if path.is_file()]
    assert files == [
        path.relative_to(tmp_path / "whole") for path in sorted((tmp_path / "whole").rglob("*")) if path.is_file()
    ]
    assert all((options.out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)
    assert prepare(options).up_to_date


def changed(tokenizer: Path, directory: Path, **settings: Any) -> Path:
    """The tokenizer with other keys in its tokenizer_config.json."""
    shutil.copytree(tokenizer, directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


@pytest.mark.parametrize("kind", [Kind.instructions, Kind.preferences])
def test_settings_of_the_tokenizer_are_part_of_the_identity(tokenizer: Path, tmp_path: Path, kind: Kind) -> None:
    """Those of transformers that change tokens, and no others; earlier versions wrote none of them down."""
    source = write(tmp_path / "in.jsonl", [*PLAIN] if kind is Kind.instructions else PAIRS)
    options = PrepareOptions(source, tmp_path / "out", tokenizer=tokenizer, kind=kind, val_fraction=0.0)
    prefixed = replace(options, tokenizer=changed(tokenizer, tmp_path / "prefixed", add_prefix_space=True))
    shown = replace(options, tokenizer=changed(tokenizer, tmp_path / "shown", padding_side="left"))
    first = prepare(options)
    other = prepare(replace(prefixed, out=tmp_path / "other"))
    assert other.corpus.sha256 != first.corpus.sha256, "the tokens are others"
    file = tmp_path / "out" / "corpus.json"
    summary = json.loads(file.read_text())
    del summary["inputs"]["tokenizer_settings"]
    for content in (file.read_text(), json.dumps(summary)):
        file.write_text(content)
        assert prepare(options).up_to_date
        assert prepare(shown).up_to_date
        with pytest.raises(UserError, match=r"holds another corpus; differs in tokenizer_settings \("):
            prepare(prefixed)


@pytest.mark.parametrize("too_long", list(TooLong))
def test_records_that_are_too_long(tokenizer: Path, tmp_path: Path, too_long: TooLong) -> None:
    whole = expected([*PLAIN, CHATS[0]], tokenizer, Targets(TargetResponses.all))
    limit = len(whole[-1][0]) - 3
    assert max(len(tokens) for tokens, _ in whole[:-1]) <= limit
    source = write(tmp_path / "chats.jsonl", [*PLAIN, CHATS[0]])
    options = PrepareOptions(
        source,
        tmp_path / "out",
        tokenizer=tokenizer,
        kind=Kind.instructions,
        target_responses=TargetResponses.all,
        max_tokens=limit,
        too_long=too_long,
        val_fraction=0.0,
        max_loss=1.0,
        workers=1,
    )
    if too_long is TooLong.error:
        with pytest.raises(UserError, match=rf"^chats.jsonl:9: {limit + 3} tokens, and max_tokens={limit}"):
            prepare(options)
        return
    prepared = prepare(options)
    split = prepared.corpus.splits["train"]
    if too_long is TooLong.drop:
        assert stored(prepared, "train") == whole[:-1]
        assert prepared.corpus.left_out["too long"]["first"] == [f"chats.jsonl:9 ({limit + 3} tokens)"]
        assert (split.truncated_documents, split.truncated_tokens) == (0, 0)
    else:
        assert stored(prepared, "train") == [*whole[:-1], tuple(column[:limit] for column in whole[-1])]
        assert (split.truncated_documents, split.truncated_tokens) == (1, 3)
        assert not prepared.corpus.left_out


def test_pairs_are_stored_side_by_side(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", PAIRS)
    options = {"tokenizer": tokenizer, "kind": Kind.preferences, "val_fraction": 0.3, "workers": 1}
    prepared = prepare(PrepareOptions(source, tmp_path / "out", **options))
    chat = load_chat_tokenizer(tokenizer)
    pairs = [[each.tokens.tolist() for each in encode_preference(record, chat)] for record in PAIRS]
    for split in ("train", "val"):
        found = [tokens for tokens, _ in stored(prepared, split)]
        assert len(found) >= 2
        assert all(found[at : at + 2] in pairs for at in range(0, len(found), 2))
    assert sum(split.documents for split in prepared.corpus.splits.values()) == 2 * len(PAIRS)


def test_what_records_need(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", CHATS)
    with pytest.raises(UserError, match=r"^instructions need a tokenizer"):
        prepare(PrepareOptions(source, tmp_path / "out", kind=Kind.instructions))
    (tmp_path / "text.txt").write_text("text")
    options = PrepareOptions(
        str(tmp_path / "text.txt"), tmp_path / "out", kind=Kind.instructions, tokenizer=tokenizer, workers=1
    )
    with pytest.raises(UserError, match=r"text has no records; instructions are JSON Lines, Parquet or Arrow$"):
        prepare(options)
