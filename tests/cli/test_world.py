"""Which world a process belongs to, as each launcher says it; and several processes that Slurm's variables join."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch

from moefoundry.cli import train
from moefoundry.cli.train import ALLOCATOR, choose_allocator
from moefoundry.cli.world import expand_hosts, join_world
from moefoundry.config import UserError
from tests.cli.test_train import Outcome, command_line
from tests.distributed import run_distributed
from tests.train.runs import finished

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
BY_HAND = {"NTASKS": "8", "PROCID": "5", "LOCALID": "1", "NODEID": "1", "NODELIST": "gpu[07-08]"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "first",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node1,login", ["node1", "login"]),
        ("gpu[01-03,7]-ib,login", ["gpu01-ib", "gpu02-ib", "gpu03-ib", "gpu7-ib", "login"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("[1-2].cluster.org", ["1.cluster.org", "2.cluster.org"]),
    ],
)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "a,,b", "a[1-", "a[1-2", "a]1", "a[3-1]", "a[x]", "a b"])
def test_what_is_no_list_of_hosts_is_named(text: str) -> None:
    with pytest.raises(UserError, match="cannot read the list of hosts"):
        expand_hosts(text)


def joined(environment: dict[str, str]) -> tuple[int, list[str | None]]:
    environment = dict(environment)
    return join_world(environment), [environment.get(name) for name in NAMES]


def without(*names: str, **changes: str) -> dict[str, str]:
    return {name: value for name, value in STEP.items() if name not in names} | changes


@pytest.mark.parametrize(
    "environment",
    [
        STEP,
        without("SLURM_NODEID", "SLURM_LOCALID"),
        {f"SLURM_{name}": value for name, value in BY_HAND.items()},
        without("SLURM_STEP_TASKS_PER_NODE", SLURM_TASKS_PER_NODE="16(x2)", SLURM_NNODES="2"),
        without(SLURM_NTASKS="64", ENVIRONMENT="BATCH"),
    ],
    ids=["srun", "least of places", "by hand", "a smaller step", "srun in a batch script"],
)
def test_tasks_of_slurm_are_one_world(environment: dict[str, str]) -> None:
    assert joined(environment) == (8, ["5", "8", "1", "4", "1", "gpu07"])


def test_ranks_agree_on_a_port_and_steps_do_not() -> None:
    ports = []
    for changes in ({}, {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}, {"SLURM_STEP_ID": "1"}):
        environment = STEP | changes
        join_world(environment)
        ports.append(int(environment["MASTER_PORT"]))
    assert ports[0] == ports[1] != ports[2]
    assert all(1024 < port < 32768 for port in ports)
    kept = STEP | {"MASTER_PORT": "29500", "MASTER_ADDR": "10.0.0.1"}
    join_world(kept)
    assert (kept["MASTER_ADDR"], kept["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("environment", "size", "values"),
    [
        ({}, 1, [None] * 6),
        ({"SLURM_NTASKS": "1"}, 1, [None] * 6),
        ({"WORLD_SIZE": "1"}, 1, [None, "1", None, None, None, None]),
        (OPEN_MPI, 4, ["3", "4", "1", "2", "1", "first"]),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            2,
            ["1", "2", "1", "2", "0", "127.0.0.1"],
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"},
            2,
            ["1", "2", "0", "1", "1", "pod-0"],
        ),
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, 1, ["0", "1", None, None, None, None]),
    ],
    ids=["nothing", "one task", "one rank", "Open MPI", "PMI", "one rank a pod", "torchrun of one rank in a step"],
)
def test_other_launchers(environment: dict[str, str], size: int, values: list[str | None]) -> None:
    assert joined(environment) == (size, values)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS is 8, but this process is no task of srun: start it with srun"),
        (
            without("SLURM_STEP_NUM_TASKS", ENVIRONMENT="BATCH", SLURM_PROCID="0"),
            "SLURM_NTASKS is 8, but this process is no task of srun",
        ),
        (without("SLURM_STEP_NODELIST"), "none of SLURM_STEP_NODELIST, .* is set: set MASTER_ADDR"),
        (without(SLURM_PROCID="8"), "SLURM_PROCID is 8, but SLURM_STEP_NUM_TASKS is 8"),
        (without(SLURM_PROCID="one"), "SLURM_PROCID is 'one', not a number"),
        (without(SLURM_STEP_TASKS_PER_NODE="5,3"), "every node must have as many tasks"),
        (without(SLURM_PROCID="3"), r"ranks of a node must follow each other \(srun --distribution=block\)"),
        (without("SLURM_STEP_TASKS_PER_NODE", SLURM_STEP_NODELIST="a,b,c"), "says not how many a node"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "mpirun --map-by slot"),
        ({k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}, "on several nodes: set MASTER_ADDR"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK is 3, but nothing says of how many"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "MPI_LOCALRANKID is not set"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but MASTER_ADDR is not set"),
    ],
)
def test_several_processes_without_a_world_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        join_world(dict(environment))


@pytest.mark.parametrize("name", ALLOCATOR)
def test_an_environment_may_have_other_options_of_the_allocator(name: str) -> None:
    environment = {name: "max_split_size_mb:512"}
    choose_allocator(environment)
    assert environment == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize(
    ("release", "options"),
    [
        ("2.11.0+cu130", "expandable_segments:True"),
        ("2.14.1", "expandable_segments:True,pinned_max_round_threshold_mb:16"),
    ],
)
def test_segments_of_gpu_memory_grow_and_page_locked_memory_is_not_rounded(
    release: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "version", lambda package: release)
    environment = {"PATH": "/bin"}
    choose_allocator(environment)
    assert environment == {"PATH": "/bin", "PYTORCH_ALLOC_CONF": options}


def test_this_torch_knows_the_options_of_the_allocator() -> None:
    choose_allocator(environment := {})
    assert torch._C._accelerator_setAllocatorSettings(environment["PYTORCH_ALLOC_CONF"]) is None


def as_tasks_of_srun(port: int, arguments: list[str]) -> Outcome:
    """A rank with nothing but Slurm's variables, as of a task of its own."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.barrier()
    dist.destroy_process_group()
    for name in (*NAMES, "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= {
        "SLURM_JOB_ID": str(port - 12_000),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": socket.gethostname(),
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",  # where the tests run, a host's own name may have no address
    }
    return command_line(arguments)


def test_tasks_of_srun_train_one_run(tiny_overrides: Any, tmp_path: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = 12_000 + free.getsockname()[1] % 20_000
    arguments = tiny_overrides(tmp_path / "run", "max_duration=2ba", "eval_loader=null", "mesh.shard=2")
    outcomes = run_distributed(as_tasks_of_srun, 2, port, arguments)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    run = finished(tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert run.checkpoints() == ["ba2"]
