"""Training on a terminal: a live view where rank 0 has the terminal to itself, lines elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import Recipe
from tests.distributed import run_distributed
from tests.runs.terminal import Screen, environment, open_terminal, read_all
from tests.train.runs import finished
from tests.train.test_restarts import launched, ranks_of, wait_for_batch

Recipes = Callable[..., Recipe]
Overrides = Callable[..., list[str]]
LAST = "batch 4 of 4"


def train_on_a_terminal(recipe: Recipe, variables: dict[str, str], on_it: int, fails: bool) -> tuple[str, str]:
    """Train with the standard error of the first ``on_it`` ranks on a terminal of theirs.

    Returns what appeared there, and the error that ended training."""
    from composer.core import Callback
    from composer.utils import dist

    from moefoundry import build as parts
    from moefoundry.trainer import train

    class Speaker(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            print(f"rank {dist.get_global_rank()} in batch {state.timestamp.batch.value}", file=sys.stderr)
            if fails and state.timestamp.batch.value == 3:
                warnings.warn("about to fail", stacklevel=1)
                raise ValueError("failed")

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Speaker()]
    os.environ.pop("CI", None)
    os.environ.update(environment() | variables)
    controller, terminal = open_terminal()
    shared = dist.all_gather_object(os.ttyname(terminal))[0]
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append(read_all(controller)))
    if dist.get_global_rank() == 0:
        reader.start()
    dist.barrier()
    stream, error = None, ""
    if dist.get_global_rank() < on_it:
        stream = sys.stderr = open(shared, "w", encoding="utf-8")  # noqa: SIM115
    os.close(terminal)
    try:
        train(recipe)
    except ValueError as caught:
        error = str(caught)
    assert sys.stderr is stream or stream is None
    sys.stderr = sys.__stderr__
    dist.barrier()
    if stream is not None:
        stream.close()
    if dist.get_global_rank() == 0:
        reader.join()
    return "".join(seen), error


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_view_stays_in_its_place(tiny_recipe: Recipes, tmp_path: Path, ranks: int) -> None:
    recipe = tiny_recipe(tmp_path, "eval_interval=2ba", "console_log_interval=1ba")
    ((seen, _), *_) = run_distributed(train_on_a_terminal, ranks, recipe, {}, 1, False)
    screen = Screen.of(seen)
    (begins,), (last,), (ends,) = screen.where("tiny finished"), screen.where(LAST), screen.where("╰")
    assert begins < last < ends < screen.row
    assert (screen.cursor, screen.column) == (True, 0)
    above = "\n".join(screen.lines[:begins])
    assert f"{ranks} rank" in above
    assert "batch 4: held-out loss" in above
    assert [f"rank 0 in batch {batch}" in above for batch in (1, 2, 3, 4)] == [True] * 4
    assert not screen.where("batch 4/4"), "no lines of metrics"
    (load,) = screen.where("half a bar is uniform")
    assert last < load < ends
    for figure in ("loss ", "tokens/s", "host memory", "data wait", "save wait", "held out"):
        assert any(begins < line < ends for line in screen.where(figure)), figure


@pytest.mark.parametrize(
    ("variables", "on_it", "changes"),
    [
        pytest.param({}, 2, (), id="two ranks on one terminal"),
        pytest.param({"CI": "true"}, 1, (), id="continuous integration", marks=pytest.mark.slow),
        pytest.param({"TERM": "dumb"}, 1, (), id="no cursor", marks=pytest.mark.slow),
        pytest.param({}, 1, ("progress_bar=false",), id="progress_bar=false", marks=pytest.mark.slow),
    ],
)
def test_lines_stand_where_no_view_can(
    tiny_recipe: Recipes, tmp_path: Path, variables: dict[str, str], on_it: int, changes: tuple[str, ...]
) -> None:
    ((seen, _), *_) = run_distributed(train_on_a_terminal, 2, tiny_recipe(tmp_path, *changes), variables, on_it, False)
    assert "\x1b" not in seen
    assert "batch 1/4  loss" in seen
    assert "batch 4/4  loss" in seen
    assert ("rank 1 in batch 4" in seen) == (on_it == 2)


def test_an_error_is_printed_below_the_view(tiny_recipe: Recipes, tmp_path: Path) -> None:
    ((seen, error),) = run_distributed(train_on_a_terminal, 1, tiny_recipe(tmp_path), {}, 1, True)
    screen = Screen.of(seen)
    assert error == "failed", "and standard error is the terminal again"
    (begins,), (ends,), (reason,) = screen.where("tiny failed"), screen.where("╰"), screen.where("ValueError: failed")
    assert begins < reason < ends < screen.row
    (warning,) = screen.where("UserWarning: about to fail")
    assert warning < begins
    assert screen.cursor


def test_quiet_prints_nothing(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "progress_bar=false", "log_to_console=false")
    ((seen, _),) = run_distributed(train_on_a_terminal, 1, recipe, {}, 1, False)
    assert [line for line in seen.splitlines() if not line.startswith("rank 0 in batch")] == []


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("end", ["finished", "stopped", "killed"])
def test_composers_launcher_on_a_terminal(tiny_overrides: Overrides, tmp_path: Path, end: str) -> None:
    """The view is rank 0's, which the launcher leaves the terminal to; what the launcher says comes after it."""
    long = [] if end == "finished" else ["max_duration=5000ba", "save_interval=5000ba"]
    controller, terminal = open_terminal()
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append(read_all(controller)))
    reader.start()
    run_dir = tmp_path / "run"
    with launched(["composer", "-n", "2"], tiny_overrides(run_dir, *long), terminal, environment()) as launcher:
        if end != "finished":
            wait_for_batch(launcher, run_dir, 5)
            if end == "stopped":
                launcher.send_signal(signal.SIGTERM)
            else:
                os.kill(ranks_of(launcher)[0], signal.SIGKILL)
        status = launcher.wait(timeout=200)
    reader.join()
    screen = Screen.of(seen[0])
    tops, bottoms = screen.where("─ tiny"), screen.where("╰")
    assert len(tops) == len(bottoms) == (2 if end == "stopped" else 1), screen.lines
    assert sorted([*tops, *bottoms]) == [line for pair in zip(tops, bottoms, strict=True) for line in pair]
    begins, ends = tops[-1], bottoms[-1]
    assert ends < screen.row
    assert (screen.cursor, screen.column) == (True, 0)
    assert (status == 0) == (end == "finished")
    if end == "killed":
        (said,) = screen.where("Rank 0 crashed with exit code -9")
        assert said > ends
    else:
        assert f"tiny {end}" in screen.lines[begins]
        last = max(finished(run_dir).column("batch"))
        assert begins < screen.where(f"batch {last} of ")[-1] < ends
