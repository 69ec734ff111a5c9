"""The command: what it writes, submits and refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moefoundry.cli.launch import NAMES
from moefoundry.cli.main import main
from moefoundry.launching.launch import SCHEDULERS
from tests.conftest import QUICK, QUICKSTART
from tests.launching.launches import programs

LINE = ["launch", str(QUICKSTART), "--on", "slurm"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_dry_run_writes_and_submits_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LINE, "--nodes", "2", "--dry-run", "launch.ranks_per_node=2"]) == 0
    out, err = capsys.readouterr()
    (directory,) = (tmp_path / "launches").iterdir()
    assert out.splitlines() == [
        f"4 ranks; recipe.yaml, job.sbatch in {directory}",
        f"sbatch {directory}/job.sbatch",
    ]
    assert "note: train_loader.dataset.local: data/quickstart: no such directory" in err
    assert main([*LINE, "--nodes", "2", "--dry-run", "launch.ranks_per_node=2"]) == 0  # the same files
    assert len([*(tmp_path / "launches").iterdir()]) == 1


def test_a_recipe_that_does_not_fit_the_machines_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", sbatch="touch submitted")["PATH"])
    assert main([*LINE, "launch.nodes=3"]) == 2
    assert "global_train_batch_size" in capsys.readouterr().err
    assert main([*LINE, "launch.partition=x"]) == 2
    assert "did you mean 'launch.queue'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_what_the_scheduler_says_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", sbatch='echo "Submitted $#: $1"')["PATH"])
    output = tmp_path / "a b"
    assert main([*LINE, "-o", str(output), "launch.gpus_per_node=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == f"Submitted 1: {output}/job.sbatch"
    assert (found["ranks"], found["files"], found["submitted"]) == (1, ["recipe.yaml", "job.sbatch"], True)
    assert main([*LINE, "-o", str(output), "launch.gpus_per_node=1", "seed=3"]) == 2
    assert "recipe.yaml: is of another launch" in capsys.readouterr().err
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\necho 'sbatch: no partition' >&2; exit 1\n")
    assert main([*LINE, "launch.gpus_per_node=1"]) == 2
    assert "error: sbatch: exit status 1: sbatch: no partition; the files are in" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert main([*LINE, "launch.gpus_per_node=1"]) == 2
    assert "error: sbatch: no such command on this machine; where there is one: sbatch" in capsys.readouterr().err


@pytest.mark.parametrize(("ranks", "program"), [(1, "python"), (4, "composer")])
def test_local_becomes_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, program: str) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: seen.append([Path(path).name, *arguments]))
    line = ["launch", *QUICK, "--on", "local", "launch.gpus_per_node=0", f"launch.ranks_per_node={ranks}"]
    assert main([*line, "-o", str(tmp_path)]) == 0
    ((name, _, *arguments),) = seen
    assert name.startswith(program)
    assert arguments[-4:] == ["-m", "moefoundry", "train", str(tmp_path / "recipe.yaml")]
    assert arguments[:-4] == (["-n", "4"] if ranks > 1 else [])


def test_the_output_of_training_is_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(QUICKSTART), "--on", "local", "--json"]) == 2
    assert "--json goes with --on local only in a --dry-run" in capsys.readouterr().err


def test_the_command_knows_every_scheduler() -> None:
    assert list(SCHEDULERS) == list(NAMES)
