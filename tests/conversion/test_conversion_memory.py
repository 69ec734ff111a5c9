"""Conversion takes memory for blocks, not for models: measured as ``benchmarks/conversion.py`` does, on 200 MB."""

import sys
from pathlib import Path

import pytest

from benchmarks.conversion import commands, measure, model, write_model
from tests.distributed import run_distributed

MODEL_BYTES, ALLOWED_MB = 2 * 10**8, 100


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_anonymous_memory_is_bounded(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", model(MODEL_BYTES))
    assert sum(file.stat().st_size for file in (tmp_path / "hf").iterdir()) > MODEL_BYTES
    for name in ("import to fp32", "export to bf16"):
        (measured,) = run_distributed(measure, 1, commands(tmp_path)[name])
        assert 1 < measured["anonymous_mb"] < ALLOWED_MB, (name, measured)
