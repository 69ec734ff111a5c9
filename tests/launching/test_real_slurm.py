"""A run on Slurm itself: two nodes in this machine, a stop, a second start that goes on from the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from moefoundry.config import dump_recipe, load_recipe

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=off
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """Environment in which Slurm's commands find a cluster of two nodes."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root alone")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # names of sockets have 107 bytes at most
    munge = root / "munge"
    munge.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    (root / "state").mkdir()
    conf = root / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), root=root, ports=free_ports(3), user="root"))
    environment = {**os.environ, "SLURM_CONF": str(conf), "MASTER_ADDR": "127.0.0.1"}  # n1 is no host
    paths = {name: f"--{name}-file={munge}/{name}" for name in ("key", "pid", "seed", "log")}
    munged = ["munged", "--foreground", "--force", f"--socket={munge}/socket", *paths.values()]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = []
    with (root / "daemons.log").open("w") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        yield environment
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_preempted_goes_on(
    slurm: dict[str, str], tiny_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    """By the signal before the time limit, and by a job of a higher partition."""
    changes = ("run_dir=" + str(tmp_path / "a run"), "max_duration=150ba", "launch={nodes: 2, gpus_per_node: 0}")
    recipe = load_recipe(None, tiny_overrides(tmp_path, *changes, "launch.time_limit=1d"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))

    def run(*command: str) -> str:
        done = subprocess.run(command, env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def batches() -> list[int]:
        metrics = tmp_path / "a run/metrics.jsonl"
        return [json.loads(line)["batch"] for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < end, run("scontrol", "show", "job", job)
            time.sleep(0.5)

    def state() -> str:
        return run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip()

    def start_again() -> None:
        """Start the job at once; Slurm itself would wait for two minutes."""
        wait_for(lambda: state() == "PENDING")
        time.sleep(6)  # the nodes do not start a job that they are still ending
        run("scontrol", "update", f"jobid={job}", "StartTime=now")

    launch = [sys.executable, "-m", "moefoundry", "launch", "recipe.yaml", "--on", "slurm", "--json"]
    job = json.loads(run(*launch))["output"].split()[-1]
    wait_for(lambda: len(batches()) >= 10)
    run("scancel", "--signal=USR1", "--batch", job)
    start_again()
    saved = len(batches())
    assert (tmp_path / f"a run/checkpoints/ba{saved}").is_dir()
    wait_for(lambda: len(batches()) >= saved + 10)
    run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    start_again()
    wait_for(lambda: state() not in ("PENDING", "RUNNING", "COMPLETING"))
    assert state() == "COMPLETED"
    assert "Restarts=2" in run("scontrol", "show", "job", job)
    assert batches() == list(range(1, 151)), "each batch was trained once"
    assert yaml.safe_load((tmp_path / "a run/config.yaml").read_text())["launch"]["nodes"] == 2
