"""``moefoundry runs``: what files tell of runs, whole ones and damaged ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moefoundry.checkpoint.lease import held
from moefoundry.cli.main import main
from moefoundry.runs.facts import RunState, read_facts
from moefoundry.runs.metrics import Follower, last_line, read_metrics, scan
from tests.runs.writing import END, START, line_of, write_run


def listed(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["runs", str(root), "--json"]) == 0
    return {run["run_name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}


def test_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "finished")
    write_run(tmp_path / "group" / "failed", history=[START, END | {"state": "failed", "reason": "ValueError: bad"}])
    write_run(tmp_path / "stopped", batches=12, history=[START, END | {"state": "stopped", "reason": "by SIGTERM"}])
    write_run(tmp_path / "killed", batches=9, history=[START])
    write_run(tmp_path / "earlier", history=[])
    write_run(tmp_path / "earlier_stopped", batches=3, history=[])
    running = write_run(tmp_path / "running", batches=7, history=[START, END, START])
    dead = write_run(tmp_path / "silent", batches=7, history=[START])
    holder = {"token": "a", "host": "elsewhere", "kernel": "", "pid": 1, "started": 1, "since": "x"}
    (dead / "lease.json").write_text(json.dumps(holder))
    os.utime(dead / "lease.json", (0, 0))
    with held(running):
        runs = listed(tmp_path, capsys)
        assert read_facts(running).state is RunState.running
    assert {name: run["state"] for name, run in runs.items()} == {
        "finished": "finished",
        "failed": "failed",
        "stopped": "stopped",
        "killed": "stale",
        "earlier": "finished",
        "earlier_stopped": "stopped",
        "running": "running",
        "silent": "stale",
    }
    assert runs["failed"]["reason"] == "ValueError: bad"
    finished = runs["finished"]
    assert (finished["batch"], finished["max_duration"], finished["seconds"]) == (20, "20ba", 605.0)
    assert (finished["held_out_loss"], finished["best_held_out_loss"], finished["best_batch"]) == (3.5, 3.0, 15)
    assert finished["tokens_per_second"] == 1020.0
    with held(running), (running / "history.jsonl").open("a") as file:  # it has said that it ended, and is closing
        file.write(json.dumps(END | {"at": "2099-01-01T00:00:00+00:00"}) + "\n")
        file.flush()
        assert read_facts(running).state is RunState.finished


def test_the_table_has_the_keys_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", "optimizer.lr=0.5")
    write_run(tmp_path / "b", "optimizer.lr=0.25", "model.moe.top_k=1", "model.moe.balance.aux_loss_weight=0.5")
    assert main(["runs", str(tmp_path)]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[-3:] == ["top_k", "aux_loss_weight", "lr"]
    assert [row.split()[-3:] for row in rows] == [["2", "0.01", "0.5"], ["1", "0.5", "0.25"]]
    assert [row.split()[:2] for row in rows] == [["a", "finished"], ["b", "finished"]]


def test_more_keys_than_fit_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    keys = [f"optimizer.{key}" for key in ("lr=0.5", "weight_decay=0.3", "eps=1e-6")]
    keys += [
        f"model.moe.{key}" for key in ("top_k=1", "num_experts=8", "expert_hidden_size=16", "num_shared_experts=0")
    ]
    keys += [
        f"model.{key}" for key in ("d_model=64", "n_layers=2", "ffn_hidden_size=32", "init.std=0.5", "vocab_size=512")
    ]
    write_run(tmp_path / "b", *keys, "seed=3", "save_interval=5ba", "model.moe.balance.aux_loss_weight=0.5")
    assert main(["runs", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipes also differ in ")]
    assert len(line) < 200
    assert line.endswith(" and 6 more; --json has all")


def test_damaged_runs_are_listed_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "good")
    torn = write_run(tmp_path / "torn")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 21, "loss')
    (write_run(tmp_path / "no_yaml") / "config.yaml").write_text("a: [")
    levels = [f"{name}: &{name} {{x: *{one}, y: *{one}, z: *{one}}}\n" for one, name in pairwise("abcdefghijkl")]
    (write_run(tmp_path / "bomb") / "config.yaml").write_text("".join(["a: &a {x: 1, y: 2, z: 3}\n", *levels]))
    (write_run(tmp_path / "no_metrics") / "metrics.jsonl").write_text("nothing\n")
    (write_run(tmp_path / "text") / "config.yaml").write_bytes(b"\xff\xfe run_name:")
    holes = write_run(tmp_path / "holes") / "metrics.jsonl"
    lines = holes.read_bytes().splitlines(keepends=True)
    holes.write_bytes(b"".join([*lines[:4], b"\x00" * 9 + b"\n", lines[5][:30] + b"\n", *lines[6:]]))
    with (write_run(tmp_path / "gap") / "history.jsonl").open("a") as file:
        file.write('{"event": "sta\n{"event": "e')
    (tmp_path / "no_run").mkdir()
    (tmp_path / "only_lock").mkdir()
    (tmp_path / "only_lock" / "lease.json").write_text("{")
    problems = {name: run["problems"] for name, run in listed(tmp_path, capsys).items()}
    assert problems.keys() == {"good", "torn", "no_yaml", "bomb", "no_metrics", "text", "holes", "gap", "only_lock"}
    assert problems["holes"] == ["metrics.jsonl: damaged, and passed over: 2 lines, the first is line 5"]
    assert problems["gap"] == ["history.jsonl: damaged, and passed over: line 3"]
    assert problems["good"] == problems["torn"] == []
    assert problems["only_lock"] == ["config.yaml: No such file or directory"]
    assert problems["no_yaml"][0].startswith("config.yaml: while parsing")
    assert problems["bomb"] == ["config.yaml: too many keys"]
    assert problems["no_metrics"] == ["metrics.jsonl: no whole line"]
    assert problems["text"][0].startswith("config.yaml: ")
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no_metrics: metrics.jsonl: no whole line" in shown
    for path in (tmp_path / "no_run", tmp_path / "absent"):
        assert main(["runs", str(path)]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_fifty_runs_are_listed_within_a_second_and_without_torch(tmp_path: Path) -> None:
    first = write_run(tmp_path / "run0", batches=500)
    for number in range(1, 50):
        shutil.copytree(first, tmp_path / f"run{number}")
    program = (
        "import sys, resource; from moefoundry.cli.main import main; "
        f"assert main(['runs', {str(tmp_path)!r}]) == 0; "
        "assert not {'torch', 'composer'} & set(sys.modules); "
        "print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("finished") == 50
    assert float(done.stderr) < 1.0, "seconds of a CPU"


def test_parts_of_metrics_are_read_as_the_whole_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = read_metrics(run)
    assert [line["batch"] for line in lines] == list(range(1, 21))
    assert last_line(run) == lines[-1]
    key = "metrics/eval/LanguageCrossEntropy"
    assert scan(run) == ({line["batch"]: line[key] for line in lines if key in line}, [])
    (run / "metrics.jsonl").write_text("")
    assert last_line(run) is None
    assert scan(run) == ({}, [])


def test_a_follower_reads_what_is_new(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    assert follower.new_lines() == []
    path = tmp_path / "metrics.jsonl"
    first, second = (json.dumps(line_of(batch)) + "\n" for batch in (1, 2))
    path.write_text(first + second[:10])
    assert [line["batch"] for line in follower.new_lines()] == [1]
    assert follower.new_lines() == []
    path.write_text(first + second)
    assert [line["batch"] for line in follower.new_lines()] == [2]
    fresh = tmp_path / "fresh"
    fresh.write_text(first)
    fresh.replace(path)  # as a resumed run does
    assert [line["batch"] for line in follower.new_lines()] == [1]
