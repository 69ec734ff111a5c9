"""``benchmarks/fp8_study.py`` runs, and its statistics are right."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.fp8_study import CASES, compared, half_interval, main, overlap
from benchmarks.fp8_tensors import ACCUMULATORS, shortfall, sqnr


@pytest.mark.slow
def test_the_study_runs(
    tiny_overrides: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--changes", *tiny_overrides(tmp_path, "max_duration=2ba")])
    tables = capsys.readouterr().out
    assert all(f"| {case} |" in tables for case in CASES)
    (kept,) = (line for line in tables.splitlines() if "E5M6" in line)
    assert 48 < float(kept.split("|")[2].split()[0]) < 51, "dB that seven bits of significand leave"


def test_overlap_counts_choices_in_any_order() -> None:
    one, other = torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[1, 0], [3, 4]]])
    assert overlap(one, other) == [0.75]
    runs = compared([{"case": "bf16_emulated", "chosen": one}, {"case": "fp32", "chosen": other}])
    assert [run["overlap"] for run in runs] == [[1.0], [0.75]]


def test_interval_is_students() -> None:
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_sqnr_is_in_decibels() -> None:
    assert sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == 20.0


def test_promotion_keeps_sums_of_one_sign() -> None:
    lost = {name: shortfall(8192, cores) for name, cores in ACCUMULATORS.items()}
    assert lost["promoted every 128"] < 0.025 < 0.4 < lost["not promoted"]
