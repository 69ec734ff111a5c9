"""Searches by Optuna: they find the better values, prune, and go on after a kill."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="searches need Optuna, which the extra `sweep` installs")

from moefoundry.sweeping.axes import read_axes
from moefoundry.sweeping.results import results_of
from moefoundry.sweeping.run import Stopped, is_pruned
from moefoundry.sweeping.search import search
from moefoundry.sweeping.trials import Trial
from tests.sweeping.test_sweep import EXPERTS, TOP_K, silent, sweep_of

TRAINER = """
import json, math, sys, time
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
run_dir = Path(given["run_dir"])
file = run_dir / "metrics.jsonl"
begun = len(file.read_text().splitlines()) if file.exists() else 0
for batch in range(begun + 1, 5):
    loss = 3 + abs(math.log10(float(given["optimizer.lr"])) + 3) + 0.1 * (given["model.moe.top_k"] == "2")
    with file.open("a") as lines:
        line = {"batch": batch, "metrics/eval/LanguageCrossEntropy": loss, "loss/train/lm": loss}
        print(json.dumps(line), file=lines)
    time.sleep(float(given.get("seed", 0)) / 1000)
"""
AXES = ["optimizer.lr=1e-5..1e-1 log", f"{TOP_K}=1,2", "model.n_layers=2..4"]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[[Trial], list[str]]:
    """Stands for the train command: the best rate is 1e-3."""
    file = tmp_path / "trainer.py"
    file.write_text(TRAINER)
    return lambda trial: [sys.executable, str(file), *trial.overrides]


@pytest.mark.slow
def test_a_search_nears_the_best_and_goes_on(tmp_path: Path, trainer: Callable[[Trial], list[str]]) -> None:
    sweep = sweep_of(tmp_path / "sweep")
    sweep.directory.mkdir()
    axes, how = read_axes(AXES)[0], ("tpe", "none", 1)
    begun: list[Trial] = []

    def stop(trial: Trial, word: str) -> None:
        begun.append(trial)
        if len(begun) > 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        search(sweep, axes, 16, how, trainer, 1, stop)
    trials, failed = search(sweep, axes, 16, how, trainer, 2, silent)
    assert not failed
    assert 14 <= len(trials) <= 16
    results = results_of(sweep, trials)
    assert [each.state for each in results].count("done") >= 14
    assert results[0].loss is not None
    assert results[0].loss < 3.4
    assert search(sweep, axes, 16, how, lambda trial: ["/nowhere"], 1, silent)[0] == trials, "nothing more is started"


@pytest.mark.slow
def test_hopeless_trials_are_pruned(
    tmp_path: Path, trainer: Callable[[Trial], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefoundry.sweeping.run.ASKING_SECONDS", 0.1)
    sweep = sweep_of(tmp_path / "sweep")
    sweep.directory.mkdir()
    axes = read_axes(["optimizer.lr=1e-3,2e-3,5e-3,1e-2,2e-2,5e-2,1e-1,2e-1", f"{EXPERTS}=4,8,16", f"{TOP_K}=1,2"])[0]

    def slow(trial: Trial) -> list[str]:
        later = len(list(sweep.directory.rglob("trial.json"))) >= 6
        return [
            *trainer(trial),
            f"seed={1000 if later else 200}",
        ]  # milliseconds of a batch; each is asked about

    trials, failed = search(sweep, axes, 14, ("random", "median", 3), slow, 2, silent)
    assert not failed
    assert 0 < sum(map(is_pruned, trials)) < 9
