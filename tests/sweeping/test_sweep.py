"""Sweeps: axes, trials, runs that are killed and go on, and the table at the end."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moefoundry.cli.main import main
from moefoundry.config import ConfigError
from moefoundry.data.options import Part
from moefoundry.sweeping.axes import drawn, grid, read_axes
from moefoundry.sweeping.results import power_law, results_of, table, write_csv, write_plot
from moefoundry.sweeping.run import Stopped, is_done, run_all
from moefoundry.sweeping.trials import Budget, Sweep, Trial, part_of
from tests.conftest import QUICKSTART

ROOT = Path(__file__).parents[2]
EXPERTS, TOP_K = "model.moe.num_experts", "model.moe.top_k"
AXES = [f"{EXPERTS}=4,8,16", f"{TOP_K}=1,2,8"]
TRAINER = """
import json, os, sys, time
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
run_dir = Path(given["run_dir"])
file = run_dir / "metrics.jsonl"
begun = len(file.read_text().splitlines()) if file.exists() else 0
if "FAIL" in os.environ and os.environ["FAIL"] in str(run_dir):
    sys.exit("error: planted failure")
for batch in range(begun + 1, 5):
    if batch == 3 and "DIVERGE" in os.environ and os.environ["DIVERGE"] in str(run_dir):
        ended = {"event": "end", "at": "2031-01-31T12:10:05+00:00", "batch": 2, "state": "failed"}
        ended["reason"] = "NonFiniteError: batch 3: not finite: loss lm of rank 0"
        (run_dir / "history.jsonl").write_text(json.dumps(ended) + "\\n")
        sys.exit("error: batch 3: not finite")
    time.sleep(float(os.environ.get("SECONDS_OF_A_BATCH", 0)))
    loss = 6 / int(given["model.moe.num_experts"]) ** 0.1 - 0.01 * int(given["model.moe.top_k"])
    line = {"batch": batch, "loss/train/lm": loss, "moe/max_violation": 0.1}
    line |= {"throughput/tokens_per_sec": 10.0, "metrics/eval/LanguageCrossEntropy": loss}
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\\n")
"""


def sweep_of(directory: Path, budget: Budget = Budget()) -> Sweep:  # noqa: B008  # it cannot change
    return Sweep(directory, str(QUICKSTART), (), budget, 1)


def trials_of(sweep: Sweep) -> list[Trial]:
    return sweep.trials(grid(read_axes(AXES)[0]))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[[Trial], list[str]]:
    """Stands for the train command: four batches, which go on from those that are there."""
    file = tmp_path / "trainer.py"
    file.write_text(TRAINER)
    return lambda trial: [sys.executable, str(file), *trial.overrides]


def silent(trial: Trial, word: str) -> None:
    """Report nothing."""


def test_values_ranges_and_keys_that_change_together() -> None:
    axes, same = read_axes(
        [
            *AXES,
            "optimizer.lr=1e-4..1e-2 log 3",
            "optimizer.betas=[0.9,0.95],[0.9,0.99]",
            "seed=3",
            "tokenizer.name='a,b'",
        ],
        [f"{EXPERTS},{TOP_K}"],
    )
    assert same == ["seed=3", "tokenizer.name='a,b'"]
    points = list(grid(axes))
    assert len(points) == 3 * 3 * 2
    assert {(point[EXPERTS], point[TOP_K]) for point in points} == {("4", "1"), ("8", "2"), ("16", "8")}
    assert [float(point["optimizer.lr"]) for point in points[:6:2]] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert points[0]["optimizer.betas"] == "[0.9,0.95]"


def test_draws_are_within_their_ranges_and_a_longer_search_begins_with_a_shorter() -> None:
    axes, _ = read_axes(["optimizer.lr=1e-4..1e-2 log", "model.n_layers=2..6", f"{TOP_K}=1,2"])
    points = list(drawn(axes, 200, seed=3))
    assert points[:50] == list(drawn(axes, 50, seed=3))
    assert points[:50] != list(drawn(axes, 50, seed=4))
    rates = [float(point["optimizer.lr"]) for point in points]
    assert 1e-4 <= min(rates) < max(rates) <= 1e-2
    assert 60 < sum(rate < 1e-3 for rate in rates) < 140, "half of them lie below the middle of the logarithm"
    assert {point["model.n_layers"] for point in points} == {"2", "3", "4", "5", "6"}


@pytest.mark.parametrize(
    ("overrides", "zipped", "message"),
    [
        (["run_name=a,b"], [], "run_name: every run of a sweep has its own, below --output; allowed: no override"),
        ([*AXES, "run_dir=a"], [], "run_dir: every run of a sweep has its own, below --output; allowed: no override"),
        (["optimizer.lr=1e-2..1e-4"], [], "the second number must be larger"),
        (["optimizer.lr=0..1 log"], [], "begins above 0"),
        (["optimizer.lr=1e-4..1e-2 log"], [], "a grid needs a number of values: 'optimizer.lr=0.0001..0.01 log 5'"),
        ([f"{TOP_K}=1,1"], [], "1 stands there twice"),
        ([*AXES, f"{TOP_K}=1,2"], [f"{EXPERTS},{TOP_K}"], "as many values each are needed: model.moe.num_experts 3"),
        (AXES, [f"{EXPERTS},model.moe.topk"], "model.moe.topk has no list of values: no key of a recipe"),
    ],
)
def test_axes_that_make_no_sense(overrides: list[str], zipped: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        list(grid(read_axes(overrides, zipped)[0]))


def test_trials_that_do_not_validate_have_the_reason(tmp_path: Path) -> None:
    trials = trials_of(sweep_of(tmp_path))
    invalid = [trial for trial in trials if trial.problem]
    assert [trial.point for trial in invalid] == [{EXPERTS: "4", TOP_K: "8"}]
    assert "model.moe.top_k: 8 experts for each token, but model.moe.num_experts is 4" in invalid[0].problem
    assert len({trial.run_dir for trial in trials}) == 9
    assert [part_of(trials, Part(index, 2)) for index in (1, 2)] == [trials[::2], trials[1::2]]


def test_budgets_give_every_run_the_same_tokens_or_flops(tmp_path: Path) -> None:
    def batches(budget: Budget) -> list[int]:
        trials = trials_of(sweep_of(tmp_path, budget))
        words = [word for trial in trials for word in trial.overrides if word.startswith("max_duration=")]
        return [int(word.partition("=")[2].removesuffix("ba")) for word in words]

    assert batches(Budget(tokens=100_000)) == [49] * 8  # of 4 x 512 tokens
    by_flops = batches(Budget(flops=1e13))
    assert len(set(by_flops)) > 1, "those that compute more with each token see fewer"
    assert by_flops[0] > by_flops[1], "top 1 and top 2 of 4 experts"


def test_runs_end_in_a_table_and_are_not_run_again(tmp_path: Path, trainer: Callable[[Trial], list[str]]) -> None:
    sweep = sweep_of(tmp_path / "sweep")
    trials = trials_of(sweep)
    assert run_all(trials, trainer, 2, silent) == {}
    results = results_of(sweep, trials)
    assert [each.state for each in results].count("done") == 8
    losses = [each.loss for each in results if each.loss is not None]
    assert losses == sorted(losses)
    assert results[0].point == {EXPERTS: "16", TOP_K: "8"}
    assert results[0].total is not None
    assert results[0].total > (results[0].active or 0)
    text = table(results)
    assert [line.split()[:3] for line in text.splitlines()][1] == ["16", "8", "done"]
    assert "1 combinations are not valid:" in text
    write_csv(results, sweep.directory)
    write_plot(results, sweep.directory)
    with (sweep.directory / "results.csv").open() as rows:
        found = list(csv.DictReader(rows))
    assert len(found) == 9
    assert float(found[0]["held_out"]) == results[0].held_out
    assert (sweep.directory / "results.png").read_bytes().startswith(b"\x89PNG")
    assert run_all(trials, lambda trial: ["/nowhere"], 1, silent) == {}, "nothing is started"


def test_a_failed_run_is_named_and_tried_again(
    tmp_path: Path, trainer: Callable[[Trial], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = trials_of(sweep_of(tmp_path / "sweep"))
    words: list[str] = []
    monkeypatch.setenv("FAIL", "num_experts_8-top_k_2")
    failed = run_all(trials, trainer, 2, lambda trial, word: words.append(word))
    assert failed == {"num_experts=8 top_k=2": 1}
    assert any("failed with exit status 1: error: planted failure" in word for word in words)
    monkeypatch.delenv("FAIL")
    assert run_all(trials, trainer, 1, silent) == {}
    assert all(is_done(trial) or trial.problem for trial in trials)


def test_a_run_that_diverges_has_a_state_of_its_own(
    tmp_path: Path, trainer: Callable[[Trial], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tmp_path / "sweep")
    trials, words = trials_of(sweep), []
    monkeypatch.setenv("DIVERGE", "num_experts_16-top_k_8")  # it would have the lowest loss
    assert run_all(trials, trainer, 2, lambda trial, word: words.append(word)) == {}
    assert any(word.startswith("diverged in batch 3 after") for word in words)
    results = results_of(sweep, trials)
    (diverged,) = [each for each in results if each.state == "diverged"]
    assert (diverged.diverged_at, diverged.batches, diverged.loss) == (3, 2, None)
    assert [each.state for each in results[:7]] == ["done"] * 7, "it is not among the best"
    assert any(line.split()[:5] == ["16", "8", "diverged", "at", "3"] for line in table(results).splitlines())
    write_csv(results, sweep.directory)
    with (sweep.directory / "results.csv").open() as rows:
        assert [row["diverged_at"] for row in csv.DictReader(rows) if row["state"] == "diverged"] == ["3"]
    assert run_all(trials, lambda trial: ["/nowhere"], 1, silent) == {}, "it is not run again"


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_sweep_that_is_killed_twice_goes_on(tmp_path: Path, number: int) -> None:
    """Batches are neither trained twice nor left out, and no process is left behind."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    sweep = sweep_of(tmp_path / "sweep")
    script = (
        "import sys; from pathlib import Path; from tests.sweeping.test_sweep import *\n"
        f"run_all(trials_of(sweep_of(Path({str(sweep.directory)!r}))),"
        f" lambda trial: [sys.executable, {str(tmp_path / 'trainer.py')!r}, *trial.overrides], 2, silent)"
    )
    environment = os.environ | {"SECONDS_OF_A_BATCH": "0.1", "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    for done in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=ROOT)
        until = time.monotonic() + 60
        while len(list(sweep.directory.rglob("trial.json"))) < done and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) != 0
        time.sleep(0.3)
        before = {file: file.read_text() for file in sweep.directory.rglob("metrics.jsonl")}
        time.sleep(0.3)
        assert before == {file: file.read_text() for file in sweep.directory.rglob("metrics.jsonl")}, "none is running"
    trials = trials_of(sweep)
    assert 4 <= sum(map(is_done, trials)) < 8
    assert run_all(trials, lambda t: [sys.executable, str(tmp_path / "trainer.py"), *t.overrides], 2, silent) == {}
    results = [each for each in results_of(sweep, trials) if each.state == "done"]
    assert [each.batches for each in results] == [4] * 8
    for file in sweep.directory.rglob("metrics.jsonl"):
        assert [json.loads(line)["batch"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_signal_is_an_answer(tmp_path: Path, trainer: Callable[[Trial], list[str]]) -> None:
    trials = trials_of(sweep_of(tmp_path / "sweep"))

    def stop(trial: Trial, word: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run_all(trials, trainer, 1, stop)
    assert sum(map(is_done, trials)) < 8


def test_a_fit_finds_the_power(tmp_path: Path) -> None:
    sizes = [1e6, 1e7, 1e8, 1e9]
    fit = power_law(sizes, [5 * size**-0.07 for size in sizes])
    assert fit == pytest.approx((5, -0.07))
    assert power_law(sizes[:2], [1, 2]) is None


def test_the_command_refuses_what_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(QUICKSTART), "-o", str(tmp_path / "sweep")]
    assert main([*command, "model.moe.top_k=2"]) == 2
    assert "no key has several values; write model.moe.top_k=1,2,4" in capsys.readouterr().err
    assert main([*command, "model.moe.top_k=32,64"]) == 2
    assert "none of the 2 combinations is valid" in capsys.readouterr().err
    assert main([*command, "model.moe.top_k=1,2,99", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("-m moefoundry train" in line for line in lines) == 2
    assert lines[2].startswith("# top_k=99: model.moe.top_k")
    assert not (tmp_path / "sweep").exists()
    sweep_of(tmp_path / "sweep").remember()
    assert main([*command, "model.moe.top_k=1,2", "seed=3"]) == 2
    assert "a sweep with other overrides lies there" in capsys.readouterr().err


def test_wandbs_agent_starts_our_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent makes the command that the page shows, and the command's recipe is valid."""
    from wandb import wandb_agent

    (text,) = re.findall(r"^```\n(program: .*?)^```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL | re.MULTILINE)
    page = yaml.safe_load(text)
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    for variable, value in {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    agent = wandb_agent.Agent(api=None, queue=None, sweep_id="s")
    agent._sweep_command = page["command"]
    chosen = {
        name: {"value": values.get("values", [values.get("min")])[0]} for name, values in page["parameters"].items()
    }
    agent._command_run({"args": chosen, "program": page["program"], "run_id": "r"})
    ((*start, recipe, loggers, top_k, rate),) = started
    assert start == ["/usr/bin/env", "python", "scripts/train.py"]
    monkeypatch.chdir(ROOT)
    assert (recipe, loggers, top_k, rate) == (
        *("configs/quickstart.yaml", "loggers.wandb={}", "model.moe.top_k=1", "optimizer.lr=0.0001"),
    )
    assert main(["validate", recipe, loggers, top_k, rate]) == 0
    assert main(["validate", recipe, f"save_keep_best={page['metric']['name']}", "save_interval=100ba"]) == 0


@pytest.mark.slow  # nine runs, each with its imports
def test_a_sweep_of_real_runs_is_killed_twice(tiny_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    fixed = [word for word in tiny_overrides(tmp_path) if not word.startswith(("run_dir=", EXPERTS, TOP_K))]
    command = [sys.executable, "-m", "moefoundry", "sweep", *fixed, f"{EXPERTS}=2,4,8", f"{TOP_K}=1,2,4"]
    command += ["-o", str(tmp_path / "sweep"), "--parallel", "2"]
    for done in (1, 3):
        process = subprocess.Popen(command, cwd=ROOT)
        while len(list((tmp_path / "sweep").rglob("trial.json"))) < done:
            time.sleep(0.1)
            assert process.poll() is None
        process.kill()
        process.wait()
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr
    assert "1 combinations are not valid" in end.stdout
    with (tmp_path / "sweep/results.csv").open() as rows:
        found = list(csv.DictReader(rows))
    assert [row["state"] for row in found].count("done") == 8
    for row in found[:8]:
        assert float(row["held_out"]) > 0
    for file in (tmp_path / "sweep").rglob("metrics.jsonl"):
        batches = [json.loads(line)["batch"] for line in file.read_text().splitlines()]
        assert batches == list(range(1, len(batches) + 1))
