"""A signal to one rank, in the middle of a step: all ranks save after that batch and end with the documented status."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import Recipe
from moefoundry.config.errors import EXIT_STOPPED
from moefoundry.data.loader import STOP_SIGNALS
from moefoundry.runs.facts import RunState, read_facts
from tests.distributed import RankError, captured_output, run_distributed
from tests.train.runs import Run, finished, run_recipe

Overrides = Callable[..., list[str]]
STEPS = ("max_duration=6ba", "eval_interval=6ba", "callbacks.report={max_new_tokens: 2}")


def train_with_signals(arguments: list[str], signals: list[int], batch: int, second_is_a_request: bool) -> tuple:
    """The command line's status and standard error of a rank; the last rank sends itself ``signals`` in ``batch``."""
    from composer.core import Callback
    from composer.utils import dist

    from moefoundry import build as parts
    from moefoundry.callbacks import signals as module
    from moefoundry.cli.main import main

    class Sender(Callback):
        def after_forward(self, state: Any, logger: Any) -> None:
            last = dist.get_global_rank() == dist.get_world_size() - 1
            if state.timestamp.batch.value == batch - 1 and last:
                for signum in signals:
                    os.kill(os.getpid(), signum)

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Sender()]
    if second_is_a_request:
        module.REPEAT_SECONDS = -1.0
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, *texts


def train_in_a_signalled_group(arguments: list[str], signum: int) -> tuple[int, str]:
    """The command line's status and standard error of a rank, whose process group gets a signal in batch 3, as all of a
    job does from Slurm."""
    import subprocess

    from composer.core import Callback

    from moefoundry import build as parts
    from moefoundry.cli.main import main

    os.setpgid(0, 0)

    class Scheduler(Callback):
        def after_forward(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch.value == 2:
                subprocess.run(["kill", f"-{signum}", "--", f"-{os.getpgrp()}"], check=True, start_new_session=True)

    build_callbacks = parts.build_callbacks
    parts.build_callbacks = lambda *args: [*build_callbacks(*args), Scheduler()]
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, texts[1]


SIGNALS = [
    pytest.param(signum, id=signum.name, marks=() if signum == signal.SIGTERM else pytest.mark.slow)
    for signum in STOP_SIGNALS
]


@pytest.fixture(scope="module")
def whole(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("whole"), *STEPS), 2)


@pytest.mark.parametrize("signum", SIGNALS)
def test_row19_all_ranks_save_and_the_run_resumes(
    tiny_overrides: Overrides,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    whole: Run,
    signum: signal.Signals,
) -> None:
    """The launcher's copy of the signal comes with it, and changes nothing."""
    arguments = tiny_overrides(tmp_path / "run", *STEPS)
    outcomes = run_distributed(train_with_signals, 2, arguments, [signum, signal.SIGTERM], 3, False)
    assert [status for status, _, _ in outcomes] == [EXIT_STOPPED, EXIT_STOPPED] == [75, 75]
    assert f"stopped by {signum.name}; go on from {tmp_path}/run/checkpoints/ba3 with autoresume=true" in outcomes[0][2]
    assert "held-out loss" not in outcomes[0][2], "no time for the evaluation at the end"
    assert outcomes[0][1] == "", "nor for the report"
    assert (outcomes[1][1], "stopped by" in outcomes[1][2]) == ("", False)

    stopped = finished(tmp_path / "run")
    assert list(stopped.column("batch")) == [1, 2, 3]
    assert stopped.checkpoints() == ["ba3"]
    facts = read_facts(tmp_path / "run")
    assert (facts.state, facts.reason) == (RunState.stopped, f"by {signum.name}")
    resumed = run_recipe(tiny_recipe(tmp_path / "run", *STEPS, "autoresume=true"), 2)
    assert resumed.exact() == whole.exact()
    evaluation = "metrics/eval/LanguageCrossEntropy"
    assert resumed.column(evaluation) == whole.column(evaluation)


@pytest.mark.parametrize("signum", SIGNALS)
def test_row19_loader_processes_leave_signals_to_their_rank(
    tiny_overrides: Overrides, tmp_path: Path, signum: signal.Signals
) -> None:
    arguments = tiny_overrides(tmp_path, *STEPS, "train_loader.num_workers=2", "eval_loader=null")
    ((status, err),) = run_distributed(train_in_a_signalled_group, 1, arguments, int(signum))
    assert status == EXIT_STOPPED, err
    assert f"stopped by {signum.name}" in err
    assert finished(tmp_path).checkpoints() == ["ba3"]


@pytest.mark.slow
def test_row19_a_signal_in_the_last_batch_stops_nothing(tiny_overrides: Overrides, tmp_path: Path) -> None:
    arguments = tiny_overrides(tmp_path, *STEPS)
    ((status, out, err),) = run_distributed(train_with_signals, 1, arguments, [signal.SIGTERM], 6, False)
    assert status == 0
    assert "go on with" in out
    assert "stopped by" not in err


def test_row19_a_second_request_ends_at_once(tiny_overrides: Overrides, tmp_path: Path) -> None:
    arguments = tiny_overrides(tmp_path, *STEPS)
    with pytest.raises(RankError, match="rank 0 ended with exit status -15"):
        run_distributed(train_with_signals, 1, arguments, [signal.SIGUSR1, signal.SIGTERM], 3, True)
    assert list(finished(tmp_path).column("batch")) == [1, 2]
    assert not (tmp_path / "checkpoints").exists()
