"""Trackers of a run that resumes, in a directory of odd letters: one entry each, one axis, all where it belongs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moefoundry.callbacks import tracker_clients
from moefoundry.callbacks.tracker_clients import mlflow_uri
from moefoundry.callbacks.trackers import build_trackers, try_trackers
from moefoundry.config import CometConfig, LoggersConfig, MLflowConfig, TensorBoardConfig, UserError, WandbConfig
from tests.distributed import captured_output, run_distributed
from tests.train.runs import Run, finished

Overrides = Callable[..., list[str]]
ODD = "odd%20ü#1?x y"
FAKES = str(Path(__file__).parent / "fakes")
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
    sys.path.insert(0, FAKES)
    os.environ |= {"WANDB_MODE": "offline", "COMET_START_ONLINE": "false"}
    sys.argv = ["scripts/train.py", *arguments]
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, *texts


@pytest.fixture(scope="module")
def resumed(tiny_overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three batches, then five more, from the default recipe's report on."""
    root = tmp_path_factory.mktemp("trackers")
    loggers = "{wandb: {}, tensorboard: {}, mlflow: {}, comet: {tags: [odd]}, file_logger: {}}"
    arguments = [*tiny_overrides(root / ODD, "eval_interval=2ba"), f"loggers={loggers}"]
    arguments += ["callbacks.system_monitor={every: 2}", f"loggers.file_logger.filename={root / ODD}/log of all.txt"]
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


def test_comet_goes_on_with_its_experiment(resumed: Run) -> None:
    identity = json.loads((resumed.run_dir / "trackers.json").read_text())["comet"]
    archives = sorted((resumed.run_dir / "comet").glob("*/*"))
    assert [path.parent.name + path.stem for path in archives] == [f"1{identity}", f"2{identity}"]
    first, second = (json.loads(path.read_text()) for path in archives)
    assert (first["name"], first["tags"]) == ("tiny", ["odd"])
    assert first["parameters"]["model.moe.top_k"] == 2
    for name in ("loss/train/lm", "moe/max_violation", HELD_OUT):
        logged = {step: value for step, name_of, value in [*first["metrics"], *second["metrics"]] if name_of == name}
        assert logged == resumed.column(name), name


def test_the_file_goes_on_and_has_each_batch_once(resumed: Run) -> None:
    lines = (resumed.run_dir / "log of all.txt").read_text().splitlines()
    assert "[hyperparameter]: model.moe.top_k: 2" in lines
    for name in ("loss/train/lm", "moe/max_violation", HELD_OUT):
        logged = [line.rpartition(": ")[::2] for line in lines if f"]: {name}: " in line]
        expected = [(f"[metric][batch={batch}]: {name}", value) for batch, value in resumed.column(name).items()]
        assert [(begin, float(value)) for begin, value in logged] == expected


def test_lines_of_batches_that_are_trained_again_are_dropped(tmp_path: Path) -> None:
    assert run_distributed(lines_of_a_resume, 1, tmp_path / "log.txt")[0] == ["a", "[metric][batch=2]: x: 1.0"]


def lines_of_a_resume(path: Path) -> list[str]:
    from composer.core import Timestamp

    from moefoundry.callbacks.destinations import LogFile

    path.write_text("a\n[metric][batch=2]: x: 1.0\n[metric][batch=3]: x: 1.0\n[metric][batch=2]: torn")
    state: Any = SimpleNamespace(timestamp=Timestamp(batch=2))
    LogFile(path, continues=True).init(state, cast(Any, None))
    return path.read_text().splitlines()


def test_the_system_is_measured(resumed: Run) -> None:
    for name in ("system/host_percent", "system/host_memory_percent"):
        column = resumed.column(name)
        assert list(column) == [2, 4]
        assert all(0 <= value <= 100 for value in column.values())
    assert min(resumed.column("system/host_memory_percent").values()) > 0


def lost_trackers() -> tuple[list[str], list[Any]]:
    from composer.core import Event, Timestamp
    from composer.loggers import LoggerDestination

    from moefoundry.callbacks.by_batch import ByBatch

    got: list[Any] = []

    class Refusing(LoggerDestination):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            got.append((step, metrics))
            if len(got) == 2:
                raise ConnectionError("no route\nto https://me:hidden@host")

        def post_close(self) -> None:
            raise AssertionError("a lost tracker gets nothing more")

    tracker = ByBatch(Refusing(), "loggers.mine")
    with captured_output() as texts:
        for batch in (1, 2, 3):
            state: Any = SimpleNamespace(timestamp=Timestamp(batch=batch))
            tracker.log_metrics({"x": batch})
            tracker.run_event(Event.BATCH_CHECKPOINT, state, cast(Any, None))
        tracker.post_close()
    return texts, got


def test_a_tracker_that_is_lost_ends_no_run() -> None:
    (out, err), got = run_distributed(lost_trackers, 1)[0]
    assert got == [(1, {"x": 1}), (2, {"x": 2})]
    expected = "loggers.mine: lost: no route to https://(secret)@host; metrics.jsonl has all metrics"
    assert (out, err) == ("", f"warning: {expected}\n")


def test_a_run_that_starts_anew_has_metrics_of_its_own(tiny_overrides: Overrides, tmp_path: Path) -> None:
    arguments = tiny_overrides(tmp_path, "max_duration=2ba", "eval_loader=null")
    for _ in range(2):
        ((status, _, err),) = run_distributed(train_with_trackers, 1, arguments)
        assert status == 0, err
        shutil.rmtree(tmp_path / "checkpoints")
    for name in ("metrics.jsonl", "metrics.superseded.jsonl"):
        assert [json.loads(line)["batch"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "uri", ["odd%20ü#1?x", *(pytest.param(uri, marks=pytest.mark.slow) for uri in (None, "~/odd%"))]
)
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
    monkeypatch.setattr(tracker_clients, "PATIENCE", 0.2)
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


@pytest.fixture
def answering() -> Any:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "http://{}:{}".format(*server.server_address)
        server.shutdown()


def asked_without_login(answering: str, home: Path) -> list[str]:
    os.environ |= {"WANDB_BASE_URL": answering, "COMET_URL_OVERRIDE": answering, "HOME": str(home)}
    for name in ("WANDB_MODE", "WANDB_API_KEY", "COMET_API_KEY"):
        os.environ.pop(name, None)
    sys.path.insert(0, FAKES)
    asked = [LoggersConfig(wandb=WandbConfig()), LoggersConfig(comet=CometConfig())]
    messages = []
    for cfg in asked:
        with pytest.raises(UserError) as caught:
            try_trackers(cfg)
        messages.append(str(caught.value))
    os.environ |= {"WANDB_API_KEY": "0" * 40, "COMET_API_KEY": "0" * 25}
    try_trackers(asked[1])
    os.environ["COMET_URL_OVERRIDE"] = "http://127.0.0.1:9"
    with pytest.raises(UserError) as caught:
        try_trackers(asked[1])
    return [*messages, str(caught.value)]


def test_a_missing_login_is_named(answering: str, tmp_path: Path) -> None:
    wandb, comet, refused = run_distributed(asked_without_login, 1, answering, tmp_path)[0]
    assert wandb == "loggers.wandb: no login; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
    assert comet == "loggers.comet: no login; run `comet login`, or set COMET_API_KEY, or COMET_START_ONLINE=false"
    assert refused.startswith("loggers.comet: http://127.0.0.1:9 does not answer: ")
    assert refused.endswith("or set COMET_START_ONLINE=false")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_clients, "find_spec", {}.get)
    with pytest.raises(
        UserError, match=r"^loggers\.tensorboard: the package tensorboard is not installed; `pip install"
    ):
        try_trackers(LoggersConfig(tensorboard=TensorBoardConfig()))


def test_a_tracker_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such\nexperiment")

    monkeypatch.setattr(tracker_clients, "MLFlowLogger", refuse)
    with pytest.raises(UserError, match=r"^loggers\.mlflow: cannot be used: no such experiment$"):
        build_trackers(LoggersConfig(mlflow=MLflowConfig()), tmp_path, continues=False)
