"""What ``model.moe.backend: auto`` takes on a GPU: what was measured to be fastest there, and can run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu.fastest import fastest
from moefoundry.config import MoEConfig
from moefoundry.moe import mixture
from moefoundry.moe.fastest import Measured, backends_by_speed, measured_layers
from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.swiglu import Activation

H100 = "NVIDIA H100 80GB HBM3"
LAYERS = (
    Measured(H100, "bfloat16", 4096, 1024, 2048, {"quack": 1.0, "triton": 1.1, "grouped_mm": 2.0}),
    Measured(H100, "bfloat16", 2048, 1024, 64, {"quack": 3.0, "grouped_mm": 2.0}),
    Measured("another", "bfloat16", 1024, 1024, 64, {"triton": 1.0}),
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefoundry.moe.fastest.measured_layers", lambda: LAYERS)


def test_the_package_names_backends_that_there_are() -> None:
    for layer in measured_layers():
        assert all(callable(getattr(mixture, name)) for name in layer.ms)


@pytest.mark.usefixtures("measured")
def test_the_nearest_size_of_the_same_device_counts() -> None:
    assert backends_by_speed(H100, "bfloat16", 4096, 512, 1000) == ["quack", "triton", "grouped_mm"]
    assert backends_by_speed(H100, "bfloat16", 1024, 1024, 64) == ["grouped_mm", "quack"]
    assert backends_by_speed(H100, "float32", 4096, 1024, 2048) == []
    assert backends_by_speed("unknown", "bfloat16", 4096, 1024, 2048) == []


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("can_run", "hidden", "expected"),
    [
        ({"quack", "triton"}, PLAIN_LAYER, "quack"),
        ({"triton"}, PLAIN_LAYER, "triton"),
        ({"quack", "triton"}, HiddenLayer(Activation(limit=7.0)), "triton"),
        (set(), PLAIN_LAYER, "grouped_mm"),
    ],
)
def test_the_fastest_that_can_run_is_taken(
    can_run: set[str], hidden: HiddenLayer, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def obstacle(self: mixture.KernelMixture, *_: Any) -> str:
        return "" if self.backend in can_run else "it is not here"

    monkeypatch.setattr(mixture.KernelMixture, "obstacle", obstacle)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    auto = mixture.auto(MoEConfig(num_experts=2, top_k=1, expert_hidden_size=1024))
    tokens = torch.empty(1, 4096, dtype=torch.bfloat16)
    found = auto.on_gpu(tokens, 1024, 2048, hidden)
    assert getattr(found, "backend", "grouped_mm") == expected


def test_on_a_gpu_the_table_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of a GPU has a device, shapes and a dtype; nothing is computed here."""
    tokens = SimpleNamespace(device=torch.device("cuda"), shape=(4, 8), dtype=torch.bfloat16, itemsize=2)
    order, down = SimpleNamespace(slot_of_row_N=range(6)), mock.MagicMock(shape=(2, 8, 16))
    down.__len__.return_value = 2
    asked: list[Any] = []

    def on_gpu(self: Any, *case: Any) -> Any:
        asked.append(case)
        return lambda *operands: "mixed"

    monkeypatch.setattr(mixture.AutoMixture, "on_gpu", on_gpu)
    auto = mixture.auto(MoEConfig(num_experts=2, top_k=1, expert_hidden_size=16))
    by_rows = mock.Mock(return_value="by rows")
    auto = mixture.AutoMixture(by_rows, auto.cfg)
    assert auto(tokens, None, None, None, down, order) == "by rows", "nothing is measured"
    monkeypatch.setattr(mixture, "measured_layers", lambda: LAYERS)
    assert auto(tokens, None, None, None, down, order) == "mixed"
    assert asked == [(tokens, 16, 3.0, PLAIN_LAYER)]


@pytest.mark.usefixtures("measured")
def test_a_run_of_the_benchmark_makes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over routers of what was right with each; entries of other devices stay."""
    monkeypatch.setattr("benchmarks.gpu.fastest.measured_layers", lambda: LAYERS)
    size, parts = "T256 D64 F32 E8 K2", {}
    for backend, times in {"quack": (1, 2, 3), "triton": (1, 1, 1), "grouped_mm": (5, 5, 5)}.items():
        for router, ms in zip(("uniform", "zipf", "real"), times, strict=True):
            parts[f"{size}, {router} router, {backend}, bf16"] = {"state": "done", "both": {"ms": ms}}
    parts[f"{size}, real router, triton, bf16"]["wrong"] = "over 0.01: output_error"
    parts[f"{size}, uniform router, megablocks, bf16"] = {"state": "not run", "reason": "it is not installed"}
    parts[f"{size}, uniform router, loop, fp32"] = {"state": "done", "both": {"ms": 1}}
    made = fastest({"versions": {"device": H100}, "steps": {"layer": {"parts": parts}}})
    assert made == [
        LAYERS[2]._asdict(),
        Measured(H100, "bfloat16", 64, 32, 64.0, {"quack": 2.0, "grouped_mm": 5.0})._asdict(),
    ]
