"""Launchers: torchrun restarts a run whose rank died, and the run resumes by itself; a signal to one stops the run."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from moefoundry.config import Recipe
from moefoundry.config.errors import EXIT_STOPPED
from tests.distributed import _remove_shared_memory, start_server
from tests.train.runs import finished, run_recipe
from tests.train.test_resume import kill_in_batch_9

ROOT = Path(__file__).parents[2]
Overrides = Callable[..., list[str]]
STEPS = ("max_duration=12ba", "save_interval=2ba", "eval_loader=null")
SEGMENT = 900_000  # names the shared memory of the agent's ranks, of which a killed one leaves some


def train_or_be_killed(recipe: Recipe, directory: Path) -> int:
    """Train; the agent's first attempt loses its last rank in batch 9. Returns the number of this attempt."""
    os.chdir(directory)
    tempfile.tempdir = str(directory)
    faulthandler.dump_traceback_later(60, exit=True, file=open(f"hung{os.environ['RANK']}", "w"))  # noqa: SIM115
    from streaming.base.shared import prefix

    from moefoundry.trainer import train

    resource_tracker.register = resource_tracker.unregister = lambda name, kind: None  # as in tests.distributed
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    prefix._each_prefix_int = lambda: count(SEGMENT + 5 * attempt)
    if attempt == 0:
        kill_in_batch_9()
    train(recipe)
    faulthandler.cancel_dump_traceback_later()
    return attempt


@pytest.mark.slow
def test_row15_restarted_by_torchruns_agent(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """``torchrun --max-restarts 1`` without its start of interpreters: its agent, on forked ranks."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        monitor_interval=0.1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=tmp_path.name,
        start_method="forkserver",
    )
    start_server()
    recipe = tiny_recipe(tmp_path / "run", *STEPS, "autoresume=true")
    try:
        assert elastic_launch(config, train_or_be_killed)(recipe, tmp_path) == {0: 1, 1: 1}
    finally:
        _remove_shared_memory(SEGMENT)
    run = finished(tmp_path / "run")
    assert run.exact() == run_recipe(tiny_recipe(tmp_path / "whole", *STEPS), 2).exact()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) < 12 + 2 + 1, "the second attempt began from a checkpoint"


@contextmanager
def launched(
    command: list[str], overrides: list[str], output: Path | int, variables: Mapping[str, str] = os.environ
) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher of this environment on the training script; everything it starts is gone afterwards.

    ``output`` is a file, or the descriptor of one, which is closed at the end."""
    binaries = Path(sys.executable).parent
    arguments = [binaries / command[0], *command[1:], "scripts/train.py", "configs/quickstart.yaml", *overrides]
    environment = {**variables, "OMP_NUM_THREADS": "1"}
    with open(output, "wb") as file:
        launcher = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            yield launcher
        finally:
            if launcher.poll() is None:
                for process in (launcher, *psutil.Process(launcher.pid).children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            launcher.wait()


def wait_for_batch(launcher: subprocess.Popen[bytes], run_dir: Path, batch: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and launcher.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= batch:
            return
        time.sleep(0.05)
    raise TimeoutError(f"no batch {batch} in {run_dir}; status of the launcher: {launcher.returncode}")


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    children = psutil.Process(launcher.pid).children()
    return [child.pid for child in children if any("scripts/train.py" in word for word in child.cmdline())]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("rendezvous", ["standalone", "static"])
def test_row15_torchrun_restarts_a_killed_run(tiny_overrides: Overrides, tmp_path: Path, rendezvous: str) -> None:
    """The two ways to launch: torchrun's own rendezvous, and a fixed address, as on several nodes. The store that ranks
    meet in outlives them in both."""
    batches = 80
    where = ["--standalone"] if rendezvous == "standalone" else ["--master-port", str(free_port())]
    torchrun = ["torchrun", *where, "--nproc-per-node", "2", "--max-restarts", "1"]
    run_dir, output = tmp_path / "run", tmp_path / "output"
    long = (*STEPS, f"max_duration={batches}ba", "save_interval=5ba", "autoresume=true")
    with launched(torchrun, tiny_overrides(run_dir, *long), output) as launcher:
        wait_for_batch(launcher, run_dir, 20)
        os.kill(ranks_of(launcher)[-1], signal.SIGKILL)
        assert launcher.wait(timeout=300) == 0, output.read_text()
    run = finished(run_dir)
    assert list(run.column("batch")) == list(range(1, batches + 1))
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) < batches + 2 * 5


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["composer", "-n", "2"], EXIT_STOPPED),
        (["python"], EXIT_STOPPED),
        (["torchrun", "--standalone", "--nproc-per-node", "2"], 1),
    ],
    ids=["composer", "python", "torchrun"],
)
def test_row19_sigterm_to_the_launcher(
    tiny_overrides: Overrides, tmp_path: Path, command: list[str], status: int
) -> None:
    """torchrun has one status for whatever ends its ranks."""
    run_dir, output = tmp_path / "run", tmp_path / "output"
    long = tiny_overrides(run_dir, *STEPS, "max_duration=5000ba", "save_interval=5000ba")
    with launched(command, long, output) as launcher:
        wait_for_batch(launcher, run_dir, 5)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=100) == status, output.read_text()
    assert "stopped by SIGTERM; go on from" in output.read_text()
    last = max(finished(run_dir).column("batch"))
    assert finished(run_dir).checkpoints() == [f"ba{last}"]
