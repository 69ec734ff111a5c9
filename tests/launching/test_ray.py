"""Jobs of Ray: the command, and the program of a job on a cluster of two nodes in this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moefoundry.launching import on_ray
from moefoundry.launching.launch import write
from tests.launching.launches import launch_on, programs

COMPOSER = """\
[ -e "$LOG/crashed" ] && again=1
printf '%s\\n' "$*" >> "$LOG/arguments$6"
[ -n "$again" ] && exit 0
[ "$6" = 0 ] || exec sleep 60
until [ -e "$LOG/arguments1" ]; do sleep 0.1; done
touch "$LOG/crashed"
exit 3
"""


def test_ray_uploads_the_directory_of_the_launch(tmp_path: Path) -> None:
    options = "launch.options=[--address=http://head:8265]"
    launch = launch_on("ray", tmp_path, "run_dir=/shared/x", options, "launch.environment=[WANDB_API_KEY]")
    assert list(launch.files) == ["recipe.yaml"]
    program = ["--", "python", "-m", "moefoundry.launching.on_ray", "recipe.yaml"]
    assert launch.command == [
        *("ray", "job", "submit", "--no-wait", "--metadata-json", json.dumps({"name": "quickstart"})),
        *("--working-dir", str(tmp_path), "--address=http://head:8265", *program),
    ]
    assert launch.notes == ["WANDB_API_KEY must be set where the cluster's nodes were started"]


@pytest.mark.parametrize(("text", "status"), [("exit 75", 75), ('test "$3" = --world_size && exit 0', 0)])
def test_a_machine_gives_the_status_of_composer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int
) -> None:
    launch_on("ray", tmp_path, "run_dir=/x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", composer=text)["PATH"])
    launch = on_ray.LaunchConfig(nodes=2, gpus_per_node=0, environment=["HOME"], setup="true")
    assert on_ray._ranks(launch, "text", 1, "10.0.0.1", 29500) == status
    assert (tmp_path / "machine1/recipe.yaml").read_text() == "text"
    monkeypatch.delenv("HOME")
    assert on_ray._ranks(launch, "text", 1, "10.0.0.1", 29500) == 2


@pytest.mark.slow
def test_a_cluster_starts_all_machines_again_where_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first machine fails once while the second goes on, which is ended then."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PATH", programs(tmp_path / "bin", composer=COMPOSER)["PATH"])
    monkeypatch.setenv("LOG", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(launch_on("ray", tmp_path, "run_dir=/x", "launch.nodes=2", "launch.max_restarts=1"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert on_ray.main("recipe.yaml") == 0
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert "start 2: the last one ended with status 3" in capfd.readouterr().out
    first, second = ((tmp_path / f"arguments{rank}").read_text().splitlines() for rank in "01")
    assert len(first) == len(second) == 2
