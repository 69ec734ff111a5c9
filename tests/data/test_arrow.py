"""Data sets that Hugging Face's library wrote, by that library."""

import json
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from moefoundry.config.errors import UserError
from moefoundry.data.corpus import Corpus, open_corpus
from moefoundry.data.formats import CorpusFormat
from moefoundry.data.left_out import LeftOut
from tests.data.shards import scan

TEXTS = [f"text {number}" for number in range(25)]


def texts(place: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in open_corpus(str(place), text_key=text_key).documents()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = [{"text": text, "data": {"body": text.upper()}, "id": 1} for text in TEXTS]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    return tmp_path / "saved"


def test_rows_come_in_order(saved: Path) -> None:
    assert open_corpus(str(saved)).format is CorpusFormat.arrow
    assert texts(saved) == TEXTS
    assert texts(saved, "data.body") == [text.upper() for text in TEXTS]
    (file,) = saved.glob("data-00001-*")
    assert texts(file) == TEXTS[9:17]


def test_caches_beside_the_data_are_no_text(saved: Path) -> None:
    table = pyarrow.table({"text": ["cached"]})
    with pyarrow.ipc.new_stream(saved / "cache-1.arrow", table.schema) as stream:
        stream.write_table(table)
    assert texts(saved) == TEXTS
    (saved / "state.json").unlink()
    assert texts(saved) == ["cached", *TEXTS]


def test_one_of_several_splits_is_to_be_named(tmp_path: Path) -> None:
    parts = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"both: has the splits train, test; name one, such as .*both/train"):
        open_corpus(str(tmp_path / "both"))
    assert texts(tmp_path / "both" / "test") == ["test"]


def test_arrow_files_beside_streams(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())})
    with pyarrow.ipc.new_file(tmp_path / "x.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    assert texts(tmp_path / "x.arrow") == TEXTS


def losses(corpus: Corpus) -> dict[str, int]:
    left_out = LeftOut()
    list(corpus.documents(left_out.add))
    return {reason: left["count"] for reason, left in left_out.reasons.items()}


def test_what_cannot_be_read_is_reported(saved: Path) -> None:
    corpus = open_corpus(str(saved), text_key="body")
    assert losses(corpus) == {"without the text key": 3}
    assert "strings at text, data.body" in corpus.hint(scan(corpus).left_out)
    (file,) = saved.glob("data-00002-*")
    file.write_bytes(file.read_bytes()[:-900])
    assert losses(open_corpus(str(saved))) == {"damaged or cut off": 1}
    (saved / "state.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"state\.json: not a JSON object"):
        open_corpus(str(saved))
