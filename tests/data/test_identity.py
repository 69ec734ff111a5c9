"""Digests of data: of content and order, not of place."""

import json
import shutil
from pathlib import Path

import pytest

from moefoundry.config.errors import UserError
from moefoundry.data.identity import stream_digest
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import CorpusSummary, read_corpus_summary


def prepared(root: Path, *, step: int = 1, **options) -> CorpusSummary:
    """A corpus of thirty files, with multiples of ``step`` in their text."""
    for number in range(30):
        (root / "in").mkdir(parents=True, exist_ok=True)
        (root / "in" / f"{number:02d}.txt").write_text(f"line {step * number:03d} of a text\n" * 8)
    options = {"max_seq_len": 16, "vocab_size": 280, "val_fraction": 0.3} | options
    return prepare(PrepareOptions(str(root / "in"), root / "out", **options)).corpus


def test_the_place_does_not_count_and_the_content_does(tmp_path: Path) -> None:
    one, same = prepared(tmp_path / "one"), prepared(tmp_path / "a b#ü")
    other = prepared(tmp_path / "other", step=7)
    assert one.sha256 == same.sha256 != other.sha256
    for name in ("train", "val"):
        assert one.splits[name].sha256 == same.splits[name].sha256 != other.splits[name].sha256
        cache = Path(shutil.copytree(tmp_path / "one" / "out" / name, tmp_path / "cache" / name))
        assert stream_digest(cache) == one.splits[name].sha256
    assert one.splits["train"].sha256 != one.splits["val"].sha256


def test_the_order_and_the_encoding_count(tmp_path: Path) -> None:
    digest = prepared(tmp_path).splits["train"].sha256
    directory = tmp_path / "out" / "train"
    index = json.loads((directory / "index.json").read_text())
    (shard,) = index["shards"]
    first, second = shard | {"samples": 1}, shard | {"samples": 2}

    def digest_of(*shards: dict) -> str:
        (directory / "index.json").write_text(json.dumps(index | {"shards": shards}))
        return stream_digest(directory)

    wider = shard | {"column_encodings": ["ndarray:uint32:16"]}
    renamed = shard | {"raw_data": shard["raw_data"] | {"basename": "other.mds"}}
    found = [digest_of(first, second), digest_of(second, first), digest_of(wider), digest_of(shard)]
    assert len(set(found)) == 4
    assert found[-1] == digest_of(renamed) == digest


def test_data_of_earlier_versions_have_the_digest_too(tmp_path: Path) -> None:
    summary = prepared(tmp_path)
    file = tmp_path / "out" / "corpus.json"
    record = json.loads(file.read_text())
    del record["sha256"], record["splits"]["train"]["sha256"], record["splits"]["val"]["sha256"]
    file.write_text(json.dumps(record))
    assert read_corpus_summary(tmp_path / "out") == summary


DEEP = "[" * 100_000
"""Deeper than the parser of JSON goes."""


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"shards": [{"samples": 3}]}', '{"shards": [1]}', DEEP], ids=range(6)
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: cannot be read: "):
        stream_digest(tmp_path)
