"""Runs whose files are torn, of another kind or nonsense: still in tables, views and reports, and named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moefoundry.checkpoint.lease import LEASE_FILE
from moefoundry.cli.main import main
from moefoundry.runs.live import bar, view
from moefoundry.runs.metrics import parse_line
from moefoundry.runs.watching import Watched
from tests.runs.writing import END, START, line_of, write_run

DEEP = b"[" * 100_000


def last_line(**changes: object) -> bytes:
    return (json.dumps(line_of(21) | changes) + "\n").encode()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", b"a: " + DEEP, "config.yaml: nested too deeply"),
        (
            "config.yaml",
            b"run_name: one\nseed: 2031-01-31\nmodel: {a: !!binary aGVs, b: !!set {x, y}, c: [2031-01-31]}",
            "",
        ),
        ("config.yaml", b"\xff\xfe", "config.yaml: "),
        ("metrics.jsonl", DEEP + b"\n", "metrics.jsonl: no whole line"),
        ("metrics.jsonl", last_line(**{"loss/train/lm": "x", "grad_norm": None, "data/wait_seconds": [1]}), ""),
        ("metrics.jsonl", last_line(**{"moe/load/layer1": 3, "moe/load/layer2": [], "moe/load/x": ["x"]}), ""),
        ("metrics.jsonl", last_line(**{"loss/train/lm": 10**400, "moe/load/layer1": [float("inf"), float("nan")]}), ""),
        ("metrics.jsonl", None, "metrics.jsonl: Is a directory"),
        ("history.jsonl", DEEP + b"\n", "history.jsonl: damaged, and passed over: line 1"),
        ("history.jsonl", json.dumps(END | {"batch": float("nan")}).encode() + b"\n", "history.jsonl: damaged"),
        ("history.jsonl", json.dumps(START | {"at": "0001-01-01T00:00:00+14:00"}).encode() + b"\n", "line 1"),
        (LEASE_FILE, DEEP, ""),
        (LEASE_FILE, b'{"token": 1}', ""),
    ],
)
def test_a_damaged_file_hides_nothing_else(
    name: str, content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / "runs" / each) for each in ("one", "two")]
    file = runs[0] / name
    file.unlink(missing_ok=True)
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert main(["runs", str(tmp_path)]) == main(["runs", str(tmp_path), "--json"]) == 0
    assert said in capsys.readouterr().out
    watched = [Watched(run) for run in runs]
    for run in watched:
        run.look()
        assert [*run.plain_lines(list(run.lines))]
    Console(file=io.StringIO(), width=100).print(view(watched, 100))


def test_a_report_of_a_damaged_run_names_the_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", batches=2)
    (run / "config.yaml").write_bytes(DEEP)
    (run / "metrics.jsonl").write_bytes(DEEP + b"\n" + last_line(**{"loss/train/lm": "x", "moe/load/layer1": [None]}))
    (run / "history.jsonl").write_bytes(DEEP + b"\n")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for name in ("config.yaml: nested too deeply", "metrics.jsonl: damaged", "history.jsonl: damaged"):
        assert name in page


def test_only_what_a_metric_is_is_read() -> None:
    line = {"batch": 3, "loss": 1.5, "x": "1", "y": True, "moe/load/layer1": [1, 0.5], "moe/load/layer2": [1, None]}
    assert parse_line(json.dumps(line)) == {"batch": 3, "loss": 1.5, "moe/load/layer1": [1, 0.5]}
    assert parse_line(json.dumps({"batch": True})) is None
    assert parse_line(DEEP) is None


def test_a_load_that_is_no_number_has_a_bar() -> None:
    assert bar(float("nan"), 2.0) == bar(float("inf"), 2.0) == "█"
