"""Trackers of a run that resumes, in a directory of odd letters: one entry each, one axis, all where it belongs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.callbacks import trackers
from moefoundry.callbacks.trackers import build_trackers, mlflow_uri, try_trackers
from moefoundry.config import LoggersConfig, MLflowConfig, UserError, WandbConfig
from tests.distributed import captured_output, run_distributed
from tests.train.runs import Run, finished

Overrides = Callable[..., list[str]]
ODD = "odd%20ü#1?x y"
HELD_OUT = "metrics/eval/LanguageCrossEntropy"


def without_network() -> None:
    """Any connection that leaves the machine fails."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"connection to {address}")
        connect(self, address)

    socket.socket.connect = connect_here  # type: ignore[assignment,method-assign]


def train_with_trackers(arguments: list[str]) -> tuple[int, str, str]:
    from moefoundry.cli.main import main

    without_network()
    os.environ["WANDB_MODE"] = "offline"
    sys.argv = ["scripts/train.py", *arguments]
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, *texts


@pytest.fixture(scope="module")
def resumed(tiny_overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three batches, then five more, from the default recipe's report on."""
    root = tmp_path_factory.mktemp("trackers")
    arguments = [*tiny_overrides(root / ODD, "eval_interval=2ba"), "loggers={wandb: {}, tensorboard: {}, mlflow: {}}"]
    arguments += ["callbacks.report={max_new_tokens: 2}", "autoresume=true"]
    for length in ("3ba", "5ba"):
        ((status, out, err),) = run_distributed(train_with_trackers, 1, [*arguments, f"max_duration={length}"])
        assert status == 0, err
    assert [path.name for path in root.iterdir()] == [ODD], "nothing lies beside it"
    return finished(root / ODD, out, err)


def test_the_run_resumes_and_reports_in_its_odd_directory(resumed: Run) -> None:
    assert list(resumed.column("batch")) == [1, 2, 3, 4, 5]
    assert resumed.checkpoints() == ["ba3", "ba5"]
    assert {"config.yaml", "loss.png", "expert_load.png", "mlruns", "tensorboard", "wandb"} <= {
        path.name for path in resumed.run_dir.iterdir()
    }
    assert f"checkpoint       {resumed.run_dir}/checkpoints/ba5" in resumed.out
    assert not (resumed.run_dir / "lease.json").exists()


def scalars_of_tensorboard(directory: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_one_entry_with_the_axis_of_the_metrics_file(resumed: Run) -> None:
    entries = {path.parent for path in (resumed.run_dir / "tensorboard").rglob("events.out*")}
    assert [path.name for path in entries] == ["tiny"]
    scalars = scalars_of_tensorboard(entries.pop())
    for name in ("loss/train/lm", "moe/max_violation", "grad_norm", "lr", HELD_OUT):
        assert scalars[name] == pytest.approx(resumed.column(name), rel=1e-6), name


def test_mlflow_has_one_run_with_the_same_axis(resumed: Run) -> None:
    found = [path.parent for path in (resumed.run_dir / "mlruns").rglob("meta.yaml")]
    runs = [path for path in found if (path / "metrics").is_dir()]
    assert len(runs) == 1
    for name in ("loss/train/lm", "moe/max_violation", HELD_OUT):
        lines = [line.split() for line in (runs[0] / "metrics" / name).read_text().splitlines()]
        logged = {int(step): float(value) for _, value, step in lines}
        assert logged == pytest.approx(resumed.column(name), rel=1e-6), name


def test_the_recipe_goes_along(resumed: Run) -> None:
    (parameter,) = resumed.run_dir.glob("mlruns/*/*/params/model.moe.top_k")
    assert parameter.read_text() == "2"
    for pattern in ("wandb/**/*.wandb", "tensorboard/**/events.out*"):
        content = b"".join(path.read_bytes() for path in resumed.run_dir.glob(pattern))
        for name in (b"model.moe.top_k", b"loss/train/total", b"grad_norm", b"moe/max_violation", HELD_OUT.encode()):
            assert name in content, (pattern, name)


def test_wandb_goes_on_with_its_entry(resumed: Run) -> None:
    identity = json.loads((resumed.run_dir / "trackers.json").read_text())["wandb"]
    files = [path.stem for path in (resumed.run_dir / "wandb").rglob("*.wandb")]
    assert files == [f"run-{identity}"] * 2


def test_a_run_that_starts_anew_has_metrics_of_its_own(tiny_overrides: Overrides, tmp_path: Path) -> None:
    arguments = tiny_overrides(tmp_path, "max_duration=2ba", "eval_loader=null")
    for _ in range(2):
        ((status, _, err),) = run_distributed(train_with_trackers, 1, arguments)
        assert status == 0, err
        shutil.rmtree(tmp_path / "checkpoints")
    for name in ("metrics.jsonl", "metrics.superseded.jsonl"):
        assert [json.loads(line)["batch"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("uri", [None, "odd%20ü#1?x", "~/odd%"])
def test_paths_of_mlflow_are_urls_that_mean_the_same_path(tmp_path: Path, uri: str | None) -> None:
    from mlflow.utils.file_utils import local_file_uri_to_path

    expected = (tmp_path / ODD / "mlruns") if uri is None else Path(uri).expanduser().resolve()
    assert local_file_uri_to_path(mlflow_uri(uri, tmp_path / ODD)) == str(expected)
    assert mlflow_uri("http://me:secret@host/x", tmp_path) == "http://me:secret@host/x"


@pytest.fixture
def silent() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "http://{}:{}".format(*server.getsockname())


def test_servers_that_do_not_answer_are_named_at_once(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    begin = time.monotonic()
    message = r"^loggers\.mlflow: http://\(secret\)@127\.0\.0\.1:\d+ does not answer: timed out"
    with pytest.raises(UserError, match=message):
        try_trackers(LoggersConfig(mlflow=MLflowConfig(tracking_uri=silent.replace("//", "//me:hidden@"))))
    with pytest.raises(UserError, match=r"^loggers\.wandb: .*refused; start it, .*or set WANDB_MODE=offline$"):
        try_trackers(LoggersConfig(wandb=WandbConfig()))
    assert time.monotonic() - begin < 3
    monkeypatch.setenv("WANDB_MODE", "offline")
    try_trackers(LoggersConfig(wandb=WandbConfig()))


def test_a_tracker_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such\nexperiment")

    monkeypatch.setattr(trackers, "MLFlowLogger", refuse)
    with pytest.raises(UserError, match=r"^loggers\.mlflow: cannot be used: no such experiment$"):
        build_trackers(LoggersConfig(mlflow=MLflowConfig()), tmp_path, continues=False)
