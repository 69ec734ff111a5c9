"""Batch scripts: what bash and shellcheck say, and what they do with each exit status of the ranks."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from moefoundry.config import load_recipe
from moefoundry.config.errors import ConfigError
from moefoundry.launching.launch import write
from moefoundry.launching.slurm import SCRIPT, minutes
from tests.launching.launches import launch_on, programs, started

RANKS = """\
echo "$@" > arguments
trap 'echo stopped; exit 75' USR1
touch ready
[ -z "$STATUS" ] && { sleep 20 > /dev/null 2>&1 & wait; }
exit "$STATUS"
"""


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.partition("=")[::2] for line in lines)


def test_the_keys_of_launch_are_options_of_sbatch(tmp_path: Path) -> None:
    changes = ["gpus_per_node=8", "nodes=2", "time_limit=36h", "queue=long", "account=a1", "grace_seconds=240"]
    changes += [
        "gpu_type=h100",
        "cpus_per_node=64",
        "memory_per_node=512",
        "options=[--qos=high]",
        "workdir=/shared/a b",
    ]
    launch = launch_on("slurm", tmp_path, "global_train_batch_size=16", *(f"launch.{change}" for change in changes))
    found = directives(launch.files[SCRIPT])
    assert found == {
        "--job-name": "quickstart",
        "--nodes": "2",
        "--ntasks-per-node": "8",
        "--gpus-per-node": "h100:8",
        "--cpus-per-task": "8",
        "--mem": "512G",
        "--time": "2160",
        "--partition": "long",
        "--account": "a1",
        "--chdir": '"/shared/a b"',
        "--output": f'"{tmp_path}/%j.log"',
        "--open-mode": "append",
        "--export": "ALL",
        "--requeue": "",
        "--signal": "B:USR1@240",
        "--qos": "high",
    }
    assert launch.command == ["sbatch", str(tmp_path / SCRIPT)]
    assert [minutes(limit) for limit in ("90m", "2h", "1d")] == [90, 120, 1440]


def test_without_gpus_limits_and_names_nothing_is_asked_for(tmp_path: Path) -> None:
    found = directives(launch_on("slurm", tmp_path).files[SCRIPT])
    assert found.keys().isdisjoint({"--gpus-per-node", "--time", "--partition", "--account", "--mem", "--chdir"})
    assert found["--ntasks-per-node"] == "1"


def test_a_container_sees_the_recipe_and_the_mounts(tmp_path: Path) -> None:
    mounts = "launch.mounts=[/scratch:/scratch]"
    text = launch_on("slurm", tmp_path, "launch.image=registry/image:1", mounts).files[SCRIPT]
    assert f"--container-image=registry/image:1 --container-mounts=/scratch:/scratch,{tmp_path}:{tmp_path} " in text
    assert "python -m moefoundry train " in text
    assert launch_on("slurm", tmp_path, mounts).notes == ["launch.mounts means nothing to slurm without launch.image"]


@pytest.mark.parametrize("setup", ["", "launch.setup=module load cuda"])
def test_shells_find_no_fault_in_the_script(tmp_path: Path, setup: str) -> None:
    directory = tmp_path / "a b $HOME"
    write(launch_on("slurm", directory, *filter(None, [setup])))
    subprocess.run(["bash", "-n", str(directory / SCRIPT)], check=True)
    if (shellcheck := shutil.which("shellcheck")) is not None:
        command = [shellcheck, "--severity=warning", str(directory / SCRIPT)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("status", "state", "restarts", "requeued"),
    [
        ("0", "RUNNING", "", False),
        ("2", "RUNNING", "", False),
        ("75", "RUNNING", "", True),
        ("75", "RUNNING", "99", True),
        ("75", "COMPLETING", "", False),  # cancelled, or preempted and in the queue again
        ("138", "RUNNING", "", True),
        ("1", "RUNNING", "9", True),
        ("1", "RUNNING", "10", False),
    ],
)
def test_which_jobs_go_back_into_the_queue(
    tmp_path: Path, status: str, state: str, restarts: str, requeued: bool
) -> None:
    text = launch_on("slurm", tmp_path / "launch").files[SCRIPT]
    stubs = {"srun": RANKS, "squeue": f"echo {state}", "scontrol": 'echo "$@" > requeued'}
    environment = programs(tmp_path / "bin", **stubs) | {"STATUS": status, "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = started(text, environment, tmp_path)
    assert done.wait(20) == int(status)
    asked = tmp_path / "requeued"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_srun_and_the_job_goes_back(tmp_path: Path, signum: int) -> None:
    text = launch_on("slurm", tmp_path / "a b").files[SCRIPT]
    stubs = {"srun": RANKS, "squeue": "echo RUNNING", "scontrol": 'echo "$@" > requeued'}
    job = started(text, programs(tmp_path / "bin", **stubs) | {"SLURM_JOB_ID": "7"}, tmp_path)
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
    job.send_signal(signum)
    out, _ = job.communicate(timeout=20)
    assert (out, job.returncode) == ("stopped\n", 75)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "arguments").read_text().endswith(f"-m moefoundry train {tmp_path}/a b/recipe.yaml --wait 120\n")


def test_a_setup_that_fails_ends_the_job(tmp_path: Path) -> None:
    text = launch_on("slurm", tmp_path / "launch", "launch.setup=false").files[SCRIPT]
    job = started(text, programs(tmp_path / "bin", srun=RANKS), tmp_path)
    assert job.wait(20) == 1
    assert not (tmp_path / "ready").exists()


def test_the_recipe_that_travels_is_the_whole_one(tmp_path: Path) -> None:
    launch = launch_on("slurm", tmp_path, "model.moe.top_k=4", "callbacks.report.prompt='a\nb'", "launch.nodes=2")
    write(launch)
    write(launch)  # the same again
    recipe = load_recipe(tmp_path / "recipe.yaml", world_size=2)
    assert (recipe.autoresume, recipe.model.moe.top_k, recipe.launch.nodes) == (True, 4, 2)
    first = (tmp_path / "recipe.yaml").read_text().splitlines()[0]
    assert first.startswith("# moefoundry launch recipe.yaml model.moe.top_k=4 'callbacks.report.prompt=")
    with pytest.raises(ConfigError, match="sbatch reads no path with a quote"):
        launch_on("slurm", tmp_path / 'a"b')
