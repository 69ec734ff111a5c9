"""Documents out of records: a bad one costs itself alone, and where the text stands elsewhere, it is said where."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moefoundry.config.errors import UserError
from moefoundry.data.corpus import open_corpus
from moefoundry.data.formats import CorpusFormat
from moefoundry.data.left_out import Reason
from moefoundry.data.reading import BadBytes
from tests.data.shards import scan


def texts(place: Path, **options) -> tuple[list[str], list[tuple]]:
    """The texts of a corpus and what is left out."""
    left: list[tuple] = []
    corpus = open_corpus(str(place), **options)
    return [document.text for document in corpus.documents(lambda *item: left.append(item))], left


def file_of(tmp_path: Path, content: str | bytes, name: str = "x.jsonl") -> Path:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": null}', Reason.null),
        (b'{"text": 3}', Reason.not_string),
        (b'{"text": ["a"]}', Reason.not_string),
        (b'{"body": "x"}', Reason.no_key),
        (b'{"text": " "}', Reason.blank),
        (b'{"text": "caf\xe9"}', Reason.bad_bytes),
        (b'{"text": "\\ud800"}', Reason.bad_bytes),
        (b'{"text": "cut of', Reason.not_json),
        (b"{nope", Reason.not_json),
        (b"[1]", Reason.not_json),
        (b'"text"', Reason.not_json),
        (b"[" * 100_000, Reason.not_json),
        (b'{"text": ' + b"1" * 5000 + b"}", Reason.not_json),  # Python converts no longer numbers
    ],
)
def test_a_bad_line_costs_itself(tmp_path: Path, line: bytes, reason: Reason) -> None:
    for content, number in ((b'{"text": "a"}\n%b\n\n{"text": "b"}\n', 2), (b'{"text": "a"}\n{"text": "b"}\n%b', 3)):
        found, left = texts(file_of(tmp_path, content % line))
        assert found == ["a", "b"]
        assert [(name, why) for name, why, _ in left] == [(f"x.jsonl:{number}", reason)]
        assert len(line) <= left[0][2] <= len(line) + 1


def test_bad_bytes_are_replaced_or_do_not_matter(tmp_path: Path) -> None:
    file = file_of(
        tmp_path, b'{"text": "caf\xe9"}\n{"text": "a\\ud800b", "x": 1}\n{"text": "fine", "author": "Ren\xe9"}\n'
    )
    assert texts(file)[0] == ["fine"]
    assert texts(file, bad_bytes=BadBytes.replace) == (["caf\ufffd", "a?b", "fine"], [])


def test_nested_keys(tmp_path: Path) -> None:
    file = file_of(tmp_path, '{"data": {"text": "a"}}\n{"data.text": "b", "data": {"text": "no"}}\n{"data": "c"}\n')
    assert texts(file, text_key="data.text") == (["a", "b"], [("x.jsonl:3", Reason.no_key, 14)])


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        (
            {"id": 1, "data": {"text": "a", "more": {"raw": "b"}}},
            "x.jsonl has strings at data.text, data.more.raw: name",
        ),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            "lists at messages, such as of messages: prepare those as instructions",
        ),
        ({"n": 1}, ""),
    ],
)
def test_where_the_text_is_instead_is_said(tmp_path: Path, record: dict, hint: str) -> None:
    corpus = open_corpus(str(file_of(tmp_path, "{torn\n" + json.dumps(record))))
    found = corpus.hint(scan(corpus).left_out)
    assert hint in found
    assert bool(hint) is bool(found)


def test_json_arrays_and_single_objects_are_records(tmp_path: Path) -> None:
    records = [{"text": f"text {number}"} for number in range(3)]
    expected = (["text 0", "text 1", "text 2"], [])
    for indent in (None, 2):
        assert texts(file_of(tmp_path, json.dumps(records, indent=indent), "x.json")) == expected
        assert texts(file_of(tmp_path, json.dumps(records, indent=indent) + "\n", "x.jsonl")) == expected
    pretty = "\n".join(json.dumps(record, indent=2) for record in records)
    assert texts(file_of(tmp_path, pretty, "x.json")) == expected
    assert texts(file_of(tmp_path, "\n".join(map(json.dumps, records)).encode("utf-16"), "x.json")) == expected
    torn = json.dumps(records, indent=2)[:-20]
    found, left = texts(file_of(tmp_path, torn, "x.json"))
    assert found == ["text 0", "text 1"]
    assert [item[:2] for item in left] == [("x.json:3", Reason.not_json)]
    found, left = texts(file_of(tmp_path, json.dumps(records, indent=1) + '\n{"text": "behind"}', "x.json"))
    assert (found, [item[:2] for item in left]) == (expected[0], [("x.json:4", Reason.not_json)])


def test_lines_that_are_lists_are_not_an_array(tmp_path: Path) -> None:
    chat = json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    found, left = texts(file_of(tmp_path, f'{chat}\n{{"text": "a"}}\n{chat}\n'), text_key="text")
    assert found == ["a"]
    assert [item[:2] for item in left] == [("x.jsonl:1", Reason.not_json), ("x.jsonl:3", Reason.not_json)]


def test_json_by_glob_is_not_text(tmp_path: Path) -> None:
    file_of(tmp_path, '{"text": "a"}', "x.json")
    assert texts(tmp_path, globs=("*.json",)) == (["a"], [])
    assert texts(tmp_path) == (["a"], [])
    assert texts(tmp_path, globs=("*.json",), format=CorpusFormat.source) == (['{"text": "a"}'], [])
    file_of(tmp_path, "print()", "y.py")
    with pytest.raises(UserError, match="holds jsonl and source files; say which are the corpus: format=\\.\\.\\."):
        texts(tmp_path, globs=("*",))
    file_of(tmp_path, '{"text": "b"}\n', "z.jsonl")
    assert texts(tmp_path, format=CorpusFormat.jsonl) == (["b"], [])  # JSON beside JSONL is often about it


def test_a_name_that_says_nothing_is_looked_into(tmp_path: Path) -> None:
    assert texts(file_of(tmp_path, '{"text": "a"}\n{"text": "b"}\n', "dump")) == (["a", "b"], [])
    assert texts(tmp_path, globs=("du*",)) == (["a", "b"], [])
    assert texts(file_of(tmp_path, "words\n", "words")) == (["words\n"], [])


def parquet(tmp_path: Path, table: pa.Table, name: str = "x.parquet") -> Path:
    pq.write_table(table, tmp_path / name, row_group_size=2)
    return tmp_path / name


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3, 4], "text": ["a", None, " ", "ü漢"]})
    for name in ("x.parquet", "part-0"):
        found, left = texts(parquet(tmp_path, table, name))
        assert found == ["a", "ü漢"]
        assert [item[:2] for item in left] == [(f"{name}:2", Reason.null), (f"{name}:3", Reason.blank)]
    nested = pa.table({"data": [{"text": "a", "id": 1}, {"text": "b", "id": 2}]})
    file = parquet(tmp_path, nested)
    assert texts(file, text_key="data.text") == (["a", "b"], [])
    corpus = open_corpus(str(file))
    assert "strings at data.text" in corpus.hint(scan(corpus).left_out)
    assert texts(tmp_path, text_key="data.text")[0] == ["a", "b"]


def test_parquet_that_is_not_what_it_says(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xe9x"))
    file = parquet(tmp_path, pa.table({"text": bad}))
    found, left = texts(file)
    assert (found, [item[:2] for item in left]) == (["ok"], [("x.parquet:2", Reason.bad_bytes)])
    assert texts(file, bad_bytes=BadBytes.replace) == (["ok", "\ufffdx"], [])
    binary = parquet(tmp_path, pa.table({"text": pa.array([b"as bytes"], pa.binary())}))
    assert texts(binary) == (["as bytes"], [])
    content = binary.read_bytes()
    assert texts(file_of(tmp_path, content[:-30], "x.parquet")) == (
        [],
        [("x.parquet", Reason.damaged, len(content) - 30)],
    )
    assert texts(file_of(tmp_path, '{"text": "a"}\n', "x.parquet")) == (["a"], [])


def test_damage_costs_what_lies_behind_it(tmp_path: Path) -> None:
    import gzip

    words = random.Random(0)
    lines = [json.dumps({"text": f"{number} {words.random()}"}) for number in range(5000)]
    data = gzip.compress("\n".join(lines).encode())
    file = file_of(tmp_path, data[: len(data) // 2], "x.jsonl.gz")
    found, left = texts(file)
    assert found == [json.loads(line)["text"] for line in lines[: len(found)]]
    assert len(found) > 1000
    assert left == [("x.jsonl.gz", Reason.damaged, len(data) // 2)]


def test_random_damage_costs_the_lines_it_hits(tmp_path: Path) -> None:
    chance = random.Random(1)
    whole = [f"text {number}" for number in range(20)]
    for _ in range(200):
        data = bytearray("\n".join(json.dumps({"text": text}) for text in whole).encode())
        hits = chance.randrange(1, 4)
        for _ in range(hits):
            position = chance.randrange(len(data))
            if chance.random() < 0.5:
                data[position] = chance.randrange(256)
            else:
                data[position:position] = chance.randbytes(3)
        found, left = texts(file_of(tmp_path, bytes(data)))
        assert len(set(whole) - set(found)) <= 2 * hits, bytes(data)  # a break that is lost costs two
        assert len(found) + len(left) >= 20 - hits
