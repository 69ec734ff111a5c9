"""Shards are those of mosaicml-streaming's own writer, byte for byte, and need nothing of what that imports."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from moefoundry.data.mds import HASHES, ShardWriter


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("with_targets", [False, True])
def test_documents(tmp_path: Path, dtype: str, with_targets: bool) -> None:
    lengths = [1, 255, 256, 3, 65_535, 65_536, 40_000, 2, 300_000, 1]  # one is larger than a shard
    columns = {"targets": "uint8"} if with_targets else {}
    rows = np.random.default_rng(0)
    ours = ShardWriter(tmp_path / "ours", columns | {"tokens": dtype}, 1 << 18)
    encodings = {name: f"ndarray:{each}" for name, each in {"tokens": dtype, **columns}.items()}
    with MDSWriter(columns=encodings, out=str(tmp_path / "theirs"), hashes=HASHES, size_limit=1 << 18) as theirs:
        for length in lengths:
            sample: dict[str, Any] = {"tokens": rows.integers(0, 60_000, length).astype(dtype)}
            if with_targets:
                sample["targets"] = rows.integers(0, 2, length).astype(np.uint8)
            theirs.write(sample)
            ours.write(*(sample[name] for name in sorted(sample)))
    ours.finish()
    found = files(tmp_path / "ours")
    assert found == files(tmp_path / "theirs")
    assert len(found) > 4


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_packed_samples(tmp_path: Path, count: int) -> None:
    ours = ShardWriter(tmp_path / "ours", {"tokens": "uint16"}, 1 << 14, 16)
    columns = {"tokens": "ndarray:uint16:16"}
    with MDSWriter(columns=columns, out=str(tmp_path / "theirs"), hashes=HASHES, size_limit=1 << 14) as theirs:
        for row in np.arange(16 * count, dtype=np.uint16).reshape(count, 16):
            theirs.write({"tokens": row})
            ours.write(row)
    ours.finish()
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_preparation_imports_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n" * 300)
    words = ["prepare", str(tmp_path / "text.txt"), str(tmp_path / "out"), "--vocab-size=270", "--val-fraction=0"]
    heavy = {"torch", "transformers", "streaming", "datasets", "pyarrow"}
    call = f"from moefoundry.cli.main import main\nassert main({words}) == 0"
    code = f"import sys\n{call}\nprint({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
