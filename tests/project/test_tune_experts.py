"""``python -m benchmarks.tune_experts`` times every tiling whatever one of them does, and prints a short table."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import tune_experts
from benchmarks.gpu.figures import Figures, Part, parts_of
from moefoundry.ops.fused_experts import launches


def test_all_tilings_are_kept_and_the_fastest_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are not made, and every kernel takes longer than the one before."""
    monkeypatch.setattr(launches, "CONFIGS", dict(launches.CONFIGS))
    monkeypatch.setattr(tune_experts, "layer_of", mock.MagicMock())
    milliseconds = count(500)
    monkeypatch.setattr(tune_experts, "time_ms", lambda call: next(milliseconds) / 1000)
    figures = Figures(tmp_path / "tune.json")
    for shape in tune_experts.SHAPES:
        tune_experts.measure(figures, shape)
    tilings = sum(len(tune_experts.TILINGS[kernel.config]) for kernel in tune_experts.KERNELS.values())
    others = len(tune_experts.PEERS) + len(tune_experts.MOVES)
    assert len(figures.parts) == 1 + len(tune_experts.SHAPES) * (tilings + others)
    text = "\n".join(tune_experts.table(parts_of(tmp_path / "tune.json")))
    assert len(text) < 10_000
    (line, *_) = (line for line in text.splitlines() if "| up_swiglu |" in line)
    fastest = [line.find(str(tuple(tiling))) for tiling in tune_experts.TILINGS["up_swiglu"][: tune_experts.SHOWN]]
    assert fastest == sorted(fastest)
    assert fastest[0] > 0


def test_without_operands_every_tiling_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_experts, "layer_of", mock.Mock(side_effect=RuntimeError("an illegal access " * 30)))
    figures = Figures(tmp_path / "tune.json")
    for shape in tune_experts.SHAPES:
        tune_experts.measure(figures, shape)
    assert {part["state"] for part in figures.parts.values()} == {"failed"}
    text = "\n".join(tune_experts.table(figures.parts))
    assert len(text) < 10_000
    assert "8 of 8: RuntimeError: an illegal access" in text


def test_tilings_that_are_left_have_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "tune.json", []

    def run_apart(*arguments: str) -> int:
        calls.append(arguments)
        figures = Figures(out)
        figures.run("s; a; 1", lambda part: part.put(ms=2.0))
        if len(calls) == 1:
            Part(figures, "s; a; 2", None)  # the process ends in it
            return -11
        figures.run("s; a; 2", lambda part: pytest.fail("run again"))
        figures.run("s; a; 3", lambda part: part.put(ms=1.0))
        return 0

    monkeypatch.setattr(tune_experts, "run_apart", run_apart)
    tune_experts.measure_apart(1, out)
    assert calls == [("--shape", "1", "--out", str(out))] * 2
    assert parts_of(out)["s; a; 2"]["error"] == "its process ended with exit code -11"
    assert [*tune_experts.table(parts_of(out))][-1] == (
        "| s | a | 3 1.0; 1 2.0 | 1 of 3: its process ended with exit code -11 |"
    )


def test_a_shape_whose_process_ends_at_once_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_apart = mock.Mock(return_value=1)
    monkeypatch.setattr(tune_experts, "run_apart", run_apart)
    tune_experts.measure_apart(0, tmp_path / "tune.json")
    assert run_apart.call_count == 1


def test_a_machine_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_experts, "has_device", lambda: False)
    assert tune_experts.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
