"""``moefoundry verify``: its table, its JSON and its exit status. What it finds is in ``tests/verify``."""

from __future__ import annotations

import json

import pytest

from moefoundry.cli.main import main
from tests.conftest import QUICKSTART
from tests.distributed import captured_output, run_distributed


def run_command(*arguments: str, broken: bool = False) -> tuple[int, str]:
    if broken:
        from moefoundry.conversion.tensor_map import TensorMap

        TensorMap.their_blocks = lambda self, name, ours, spec: iter([])  # type: ignore[method-assign]
    with captured_output() as texts:
        status = main(["verify", str(QUICKSTART), *arguments])
    return status, texts[0]


FAMILY = ("model.moe.num_shared_experts=0", "model.n_dense_layers=0")


def test_table() -> None:
    ((status, out),) = run_distributed(run_command, 1, *FAMILY, "--only", "round_trip", "--ranks", "2")
    assert status == 0
    title, header, *lines = out.splitlines()
    assert title.startswith("quickstart: twin of 2 blocks (0 dense), d_model 64, gqa with 4 heads, 8 experts top-2")
    assert header.startswith("round_trip (")
    assert [line.split()[0] for line in lines] == ["ok"] * 3
    assert "mixtral: 23 tensors, 16 experts, 0 biases" in lines[0]


def fails(*arguments: str) -> tuple[int, str]:
    return run_command(*arguments, broken=True)


def test_a_failure_is_a_status_and_named_in_the_json() -> None:
    ((status, out),) = run_distributed(fails, 1, *FAMILY, "--only", "round_trip", "--json")
    assert status == 1
    found = json.loads(out)
    assert not found["passed"]
    assert found["twin"]["model.moe.num_experts"] == 8
    (check,) = found["checks"]
    assert check["check"] == "round_trip"
    assert [result["passed"] for result in check["results"]] == [True, False]


def test_an_unknown_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(QUICKSTART), "--only", "everything"]) == 2
    assert "'everything': there are meshes, balance," in capsys.readouterr().err
