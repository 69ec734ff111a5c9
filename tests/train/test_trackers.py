"""Experiment trackers: each writes into ``run_dir``, with no network."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import Recipe
from tests.train.runs import run_recipe


def without_network() -> None:
    """Any connection that leaves the machine fails."""
    os.environ["WANDB_MODE"] = "offline"
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"connection to {address}")
        connect(self, address)

    socket.socket.connect = connect_here  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize(
    ("tracker", "pattern"),
    [
        ("wandb", "wandb/offline-run-*/run-*.wandb"),
        ("tensorboard", "tensorboard/**/events.out.tfevents.*"),
        ("mlflow", "mlruns/*/*/metrics/loss/train/total"),
    ],
)
def test_tracker_writes_offline(tiny_recipe: Callable[..., Recipe], tmp_path: Path, tracker: str, pattern: str) -> None:
    recipe = tiny_recipe(tmp_path, f"loggers.{tracker}={{}}", "eval_interval=2ba")
    run = run_recipe(recipe, before=without_network)
    files = [path for path in tmp_path.glob(pattern) if path.is_file()]
    assert files, sorted(str(path) for path in tmp_path.rglob("*"))
    if tracker == "mlflow":
        logged = [float(line.split()[1]) for line in files[0].read_text().splitlines()]
        assert logged == list(run.column("loss/train/total").values())
        assert (files[0].parents[2] / "metrics/eval/LanguageCrossEntropy").is_file()
        (parameter,) = tmp_path.glob("mlruns/*/*/params/model.moe.top_k")
        assert parameter.read_text() == "2"
    else:
        content = b"".join(path.read_bytes() for path in files)
        for metric in (b"loss/train/total", b"grad_norm", b"moe/max_violation", b"metrics/eval/LanguageCrossEntropy"):
            assert metric in content, metric
        assert tracker == "tensorboard" or b"model.moe.top_k" in content, "the recipe goes along"
    assert len(run.metrics) == 4
