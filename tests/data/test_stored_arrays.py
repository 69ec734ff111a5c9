"""Samples read in parts are those that mosaicml-streaming's own reader gives."""

import os
from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset, MDSWriter

from moefoundry.config import DataError
from moefoundry.data import stored_arrays
from moefoundry.data.stored_arrays import StoredSamples

COLUMNS = {
    "documents": {"tokens": "ndarray:uint16", "targets": "ndarray:uint8"},
    "packed": {"tokens": "ndarray:uint32:7"},
    "others": {"note": "str", "id": "int", "tokens": "ndarray:uint32", "weight": "float32"},
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_any_part_of_any_column(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples of 1 to 70,000 values, whose lengths take one to four bytes, with two files open at most."""
    monkeypatch.setattr(stored_arrays, "OPEN_FILES", 2)
    draws = np.random.default_rng(0)
    with MDSWriter(columns=COLUMNS[kind], out=str(tmp_path), size_limit=20_000) as writer:
        for number in range(40):
            length = 7 if kind == "packed" else int(draws.choice([1, 5, 300, 70_000]))
            sample = {"note": "x" * (number % 5), "id": number, "weight": np.float32(number)}
            tokens = draws.integers(0, 60_000, length)
            dtype = np.uint16 if kind == "documents" else np.uint32
            sample |= {"tokens": tokens.astype(dtype), "targets": (tokens % 2).astype(np.uint8)}
            writer.write({name: sample[name] for name in COLUMNS[kind]})
    library = LocalDataset(str(tmp_path))
    reader = StoredSamples()
    for number in draws.permutation(40).tolist():
        shard, index = library.spanner[number]
        found, expected = reader.sample(shard, library.shards[shard], index), library[number]
        assert set(found) == {name for name, code in COLUMNS[kind].items() if code.startswith("ndarray")}
        for name, array in found.items():
            values = expected[name]
            assert len(array) == len(values)
            assert np.array_equal(array[:], values)
            assert array[:].dtype == values.dtype
            start, stop = sorted(draws.integers(0, len(values) + 1, 2).tolist())
            assert np.array_equal(array[start:stop], values[start:stop])


def test_a_file_that_is_cut_or_removed_while_a_run_reads_it_is_named(tmp_path: Path) -> None:
    with MDSWriter(columns=COLUMNS["packed"], out=str(tmp_path)) as writer:
        for number in range(9):
            writer.write({"tokens": np.full(7, number, np.uint32)})
    library, reader, shard = LocalDataset(str(tmp_path)), StoredSamples(), tmp_path / "shard.00000.mds"
    assert reader.sample(0, library.shards[0], 8)["tokens"][:].tolist() == [8] * 7
    os.truncate(shard, 60)
    with pytest.raises(DataError, match=rf"^{shard}: truncated while it was read$"):
        reader.sample(0, library.shards[0], 8)["tokens"][:]
    shard.unlink()
    with pytest.raises(DataError, match=rf"^{shard}: No such file or directory; it was there when it was checked$"):
        StoredSamples().sample(0, library.shards[0], 8)
