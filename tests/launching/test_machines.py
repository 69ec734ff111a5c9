"""Manifests of Kubernetes and tasks of SkyPilot: their fields, and the shell text in them with composer simulated."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moefoundry.config import load_recipe
from moefoundry.config.errors import ConfigError
from moefoundry.launching.job import fitting_name
from tests.launching.launches import MOUNTED, launch_on, programs, started

COMPOSER = """\
printf "%s " "$@" > "arguments$SKYPILOT_NODE_RANK$JOB_COMPLETION_INDEX"
"$PYTHON" -c 'import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open("ready", "w").close()
time.sleep(20)' &
wait "$!"
"""
JOB = "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"
FIELDS = {  # documented fields of each object, by its path
    "": "apiVersion kind metadata spec",
    "spec": "network failurePolicy replicatedJobs",
    "spec.network": "enableDNSHostnames",
    "spec.failurePolicy": "maxRestarts rules",
    "spec.failurePolicy.rules.0": "name action onJobFailureReasons",
    "spec.replicatedJobs.0": "name replicas template",
    JOB: "parallelism completions completionMode backoffLimit podFailurePolicy template",
    POD: "restartPolicy terminationGracePeriodSeconds nodeSelector containers volumes",
    f"{POD}.containers.0": "name image command env ports resources volumeMounts",
}
TASK_FIELDS = {"name", "num_nodes", "resources", "file_mounts", "volumes", "secrets", "run"}
RESOURCE_FIELDS = {"accelerators", "cpus", "memory", "image_id", "use_spot", "job_recovery"}


def manifest(output: Path, *changes: str) -> tuple[dict[str, Any], dict[str, Any]]:
    launch = launch_on("k8s", output, *MOUNTED, *changes)
    config_map, jobset = yaml.safe_load_all(launch.files["jobset.yaml"])
    return config_map, jobset


def pod_of(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def at(tree: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        tree = tree[int(part) if part.isdecimal() else part]
    return tree


def test_a_jobset_has_documented_fields_alone(tmp_path: Path) -> None:
    gpus = ("launch.gpus_per_node=2", "launch.nodes=2", "launch.environment=[WANDB_API_KEY]", "launch.queue=team")
    config_map, jobset = manifest(tmp_path, *gpus, "launch.memory_per_node=512")
    for path, names in FIELDS.items():
        assert set(at(jobset, path)) == set(names.split()), path
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    pod = pod_of(jobset)
    container = pod["containers"][0]
    assert container["resources"] == {"requests": {"memory": "512Gi"}, "limits": {"nvidia.com/gpu": 2}}
    secret = {"secretKeyRef": {"name": "moefoundry", "key": "WANDB_API_KEY"}}
    assert container["env"] == [{"name": "WANDB_API_KEY", "valueFrom": secret}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"recipe": "/etc/moefoundry", "shm": "/dev/shm", "mount-0": "/data"}
    assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    (tmp_path / "recipe.yaml").write_text(config_map["data"]["recipe.yaml"])
    assert load_recipe(tmp_path / "recipe.yaml", world_size=4).autoresume


def test_the_pods_of_a_jobset_make_one_world(tmp_path: Path) -> None:
    """And a stop reaches the ranks, not composer."""
    _, jobset = manifest(tmp_path / "k", "launch.nodes=2", "launch.ranks_per_node=2", "launch.setup=echo ready to go")
    command = pod_of(jobset)["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"]
    subprocess.run(["bash", "-n", "-c", command[2]], check=True)
    environment = programs(tmp_path / "bin", composer=COMPOSER) | {"JOB_COMPLETION_INDEX": "1"}
    machine = started(command[2], environment, tmp_path)
    while not (tmp_path / "ready").exists():
        assert machine.poll() is None
    machine.send_signal(signal.SIGTERM)
    out, _ = machine.communicate(timeout=20)
    assert (out, machine.returncode) == ("ready to go\n", 75)
    assert (tmp_path / "arguments1").read_text() == (
        "-n 2 --world_size 4 --node_rank 1 --base_rank 2 --master_addr quickstart-node-0-0.quickstart "
        "--master_port 29500 -m moefoundry train /etc/moefoundry/recipe.yaml --wait 120 "
    )


def test_a_task_of_skypilot_has_documented_fields_alone(tmp_path: Path) -> None:
    mounts = "launch.mounts=[s3://bucket:/data, ~/code:/code, disk:/disk]"
    launch = launch_on("skypilot", tmp_path, *MOUNTED, mounts, "launch.gpus_per_node=2", "launch.spot=true")
    task = yaml.safe_load(launch.files["task.yaml"])
    assert task.keys() <= TASK_FIELDS
    assert task["resources"].keys() <= RESOURCE_FIELDS
    assert task["resources"] == {
        "accelerators": {"H100": 2},
        "image_id": "docker:registry/image:1",
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 10, "recover_on_exit_codes": [75]},
    }
    assert task["file_mounts"] == {"/data": {"source": "s3://bucket", "mode": "MOUNT"}, "/code": "~/code"}
    assert task["volumes"] == {"/disk": "disk"}


def test_the_machines_of_skypilot_make_one_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "the value")
    changes = ("launch.nodes=2", "launch.environment=[WANDB_API_KEY]")
    launch = launch_on("skypilot", tmp_path / "sky", *MOUNTED, *changes)
    assert launch.command[-3:] == ["--secret", "WANDB_API_KEY", str(tmp_path / "sky/task.yaml")]
    assert "the value" not in "".join([*launch.files.values(), *launch.command])
    run = yaml.safe_load(launch.files["task.yaml"])["run"].replace("/tmp/", f"{tmp_path}/")
    environment = programs(tmp_path / "bin", composer='echo "$@"; exit 3')
    environment |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    machine = started(run, environment, tmp_path)
    out, err = machine.communicate(timeout=20)
    assert (err, machine.returncode) == ("", 3)
    assert " --node_rank 1 --base_rank 1 --master_addr 10.0.0.1 --master_port 29500 " in out
    assert (tmp_path / "moefoundry-recipe.yaml").read_text() == launch.files["recipe.yaml"]


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "OLMoE_1b.7b", "1b", "ü", "-", "a" * 80, "a-" * 40, "A"])
def test_names_are_what_schedulers_allow(name: str) -> None:
    """DNS-1035 labels for k8s, whose longest pod name has 63 characters; SkyPilot's names."""
    lower, mixed = fitting_name(name, 40, lower=True), fitting_name(name, 60)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", lower)
    assert re.fullmatch(r"[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?", mixed)
    assert len(lower) <= 40
    assert len(mixed) <= 60
    assert (lower == name) == (name == "olmoe-1b-7b")
    assert fitting_name(f"{name}_", 40, lower=True) != lower


def test_a_pod_name_has_63_characters_at_most(tmp_path: Path) -> None:
    changes = (f"run_name={'long-' * 16}name", "launch.nodes=128", "global_train_batch_size=128")
    name = manifest(tmp_path, *changes)[1]["metadata"]["name"]
    assert len(f"{name}-node-0-127-abcde") == 63


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ("k8s", ("run_dir=/data/x", "launch.mounts=[claim:/data]"), "launch.image: missing"),
        ("k8s", ("launch.image=i",), "run_dir: runs/quickstart counts from an unknown directory"),
        ("k8s", ("launch.image=i", "run_dir=/x", "launch.nodes=2"), "run_dir: /x is lost with the machine"),
        ("k8s", ("launch.image=i", "launch.workdir=/w", "launch.mounts=[c:/data]"), "/w/runs/quickstart is lost"),
        ("skypilot", ("run_dir=/x", "save_remote=s3://b/x", "launch.gpus_per_node=1"), "launch.gpu_type: missing"),
        ("ray", (), "run_dir: runs/quickstart counts from an unknown directory"),
        ("local", ("launch.nodes=2",), "launch.nodes: 2, but local is one machine"),
        ("slurm", ("launch.workdir=work",), "launch.workdir: work is relative; allowed: an absolute path"),
        ("slurm", ("launch.environment=[NOT_SET_HERE]",), "launch.environment: NOT_SET_HERE is not set here"),
        ("slurm", ("launch.setup=export WANDB_API_KEY=0123456789",), "launch.setup: looks like a secret"),
    ],
)
def test_what_no_scheduler_could_resume_is_refused(
    tmp_path: Path, scheduler: str, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        launch_on(scheduler, tmp_path, *changes)
    assert message in str(error.value)
    assert "0123456789" not in str(error.value)


def test_one_machine_goes_on_from_what_it_has_uploaded(tmp_path: Path) -> None:
    changes = ("launch.image=i", "run_dir=/x", "save_remote=s3://bucket/x", "launch.time_limit=1h")
    assert launch_on("k8s", tmp_path, *changes).notes == ["launch.time_limit means nothing to k8s"]
