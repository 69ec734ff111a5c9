"""The world of ranks that this process belongs to, by the environment variables of its launcher.

torchrun and composer set ``RANK``, ``WORLD_SIZE`` and the others that PyTorch and Composer read. Slurm, Open MPI and
PMI (MPICH, Intel MPI) start processes with variables of their own, from which the same are made here. A process that
one of them started with others never trains alone: each of N would be a run of one rank, in one directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from moefoundry.config.errors import UserError

FIRST_PORT, PORTS = 12_000, 20_000  # below those that systems hand out by themselves
ALONE = "for a run of one process set WORLD_SIZE=1 RANK=0"


@dataclass(frozen=True)
class World:
    """Place of a process among all.

    Attributes:
        rank, size: Number of this process, and count of all.
        local_rank, local_size: The same on this node.
        node: Number of the node.
        address: Host of rank 0.
        port: Port that it listens on, the same on every rank.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    address: str
    port: int


def join_world(environment: MutableMapping[str, str]) -> int:
    """Set PyTorch's variables for the world of this process in ``environment``. Returns its size.

    Raises:
        UserError: Several processes were started, and their variables do not make one world.
    """
    if "WORLD_SIZE" in environment or environment.get("RANK", "0") != "0":
        return _launched(environment)
    world = _from_slurm(environment) or _from_mpi(environment)
    if world is None or world.size == 1:
        return 1
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        "NODE_RANK": world.node,
    }
    environment.update({name: str(value) for name, value in values.items()})
    environment.setdefault("MASTER_ADDR", world.address)
    environment.setdefault("MASTER_PORT", str(world.port))
    return world.size


def _launched(environment: MutableMapping[str, str]) -> int:
    """Check PyTorch's own variables, complete them for one process a node, and return the size of the world."""
    size = _number(environment, "WORLD_SIZE")
    if size == 1 and environment.get("RANK", "0") == "0":
        return 1
    rank = _number(environment, "RANK")
    _check_rank(rank, size, "RANK", "WORLD_SIZE")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise UserError(f"WORLD_SIZE is {size}, but {name} is not set; start with torchrun, composer or srun")
    if "LOCAL_RANK" not in environment:
        environment.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", NODE_RANK=str(rank))
    return size


def _from_slurm(environment: Mapping[str, str]) -> World | None:
    """Read the variables of ``srun``; None where Slurm started nothing, or one task."""
    in_step = "SLURM_STEP_NUM_TASKS" in environment
    name = "SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS"
    if name not in environment or (size := _number(environment, name)) == 1:
        return None
    if "SLURM_PROCID" not in environment or (not in_step and environment.get("ENVIRONMENT") == "BATCH"):
        raise UserError(f"{name} is {size}, but this process is no task of srun: start it with srun; {ALONE}")
    rank = _number(environment, "SLURM_PROCID")
    _check_rank(rank, size, "SLURM_PROCID", name)
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = next((expand_hosts(environment[name]) for name in names if environment.get(name)), [])
    local_size = _tasks_per_node(environment, size, len(hosts))
    node = _number(environment, "SLURM_NODEID", rank // local_size)
    local_rank = _number(environment, "SLURM_LOCALID", rank % local_size)
    if rank != node * local_size + local_rank:
        raise UserError(
            f"SLURM_PROCID {rank} is task {local_rank} of node {node}, with {local_size} a node: ranks of a node must "
            "follow each other (srun --distribution=block)"
        )
    if not hosts and "MASTER_ADDR" not in environment:
        raise UserError(f"{name} is {size}, but none of {', '.join(names)} is set: set MASTER_ADDR to the first host")
    address = hosts[0] if hosts else environment["MASTER_ADDR"]
    job = "".join(environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return World(rank, size, local_rank, local_size, node, address, _port(job))


def _tasks_per_node(environment: Mapping[str, str], size: int, num_hosts: int) -> int:
    """Count the tasks of a node, which must be the same on every node."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in environment:
            groups = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in environment[name].split(",")]
            if None in groups:
                raise UserError(f"{name}: cannot read {environment[name]!r}")
            if len({match[1] for match in groups if match}) > 1:
                raise UserError(f"{name}: {environment[name]}: every node must have as many tasks")
            nodes = sum(int(match[2] or 1) for match in groups if match)
            if groups[0] and int(groups[0][1]) * nodes == size:
                return int(groups[0][1])
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"):
        if name in environment and (nodes := _number(environment, name)) and size % nodes == 0:
            return size // nodes
    if num_hosts and size % num_hosts == 0:
        return size // num_hosts
    raise UserError(f"Slurm started {size} tasks, but says not how many a node: srun --ntasks-per-node=N")


_MPI = (  # rank, size, rank on the node, ranks of the node, name of the job
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PMIX_NAMESPACE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID"),
)


def _from_mpi(environment: Mapping[str, str]) -> World | None:
    """Read the variables of ``mpirun``; None where it started nothing, or one process."""
    for rank_name, size_name, local_rank_name, local_size_name, job_name in _MPI:
        if size_name not in environment:
            continue
        if (size := _number(environment, size_name)) == 1:
            return None
        rank = _number(environment, rank_name)
        _check_rank(rank, size, rank_name, size_name)
        local_rank, local_size = _number(environment, local_rank_name), _number(environment, local_size_name)
        if local_size < 1 or size % local_size or rank % local_size != local_rank:
            raise UserError(
                f"{rank_name} {rank} is process {local_rank} of {local_size} on its node: ranks of a node must follow "
                "each other, as many on each (mpirun --map-by slot)"
            )
        if local_size < size and "MASTER_ADDR" not in environment:
            raise UserError(f"{size_name} is {size}, on several nodes: set MASTER_ADDR to the host of rank 0")
        port = _port(environment.get(job_name, "0"))
        return World(rank, size, local_rank, local_size, rank // local_size, "127.0.0.1", port)
    if environment.get("PMIX_RANK", "0") != "0":
        raise UserError(f"PMIX_RANK is {environment['PMIX_RANK']}, but nothing says of how many: use torchrun; {ALONE}")
    return None


def expand_hosts(text: str) -> list[str]:
    """Expand a list of hosts in Slurm's syntax: ``gpu[01-02,7]-ib,login`` -> gpu01-ib, gpu02-ib, gpu7-ib, login.

    Raises:
        UserError: The text is not in this syntax.
    """
    parts = re.findall(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text.strip():
        raise UserError(f"cannot read the list of hosts {text!r}")
    return [host for part in parts for host in _expand(part, text)]


def _expand(part: str, text: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    numbers: list[str] = []
    for piece in match[1].split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"cannot read the list of hosts {text!r}")
        last = int(ends[2] or ends[1])
        numbers += [str(number).zfill(len(ends[1])) for number in range(int(ends[1]), last + 1)]
    rest = _expand(part[match.end() :], text) if match.end() < len(part) else [""]
    return [part[: match.start()] + number + tail for number in numbers for tail in rest]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read a number from a variable; ``default`` where it is not set.

    Raises:
        UserError: It is not a number, or not set and has no default.
    """
    if name not in environment and default is not None:
        return default
    if name not in environment:
        raise UserError(f"{name} is not set, and other variables say that several processes were started")
    text = environment[name]
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, not a number of processes")
    return int(text)


def _check_rank(rank: int, size: int, rank_name: str, size_name: str) -> None:
    if rank >= size:
        raise UserError(f"{rank_name} is {rank}, but {size_name} is {size}: the first must be below the second")


def _port(job: str) -> int:
    """Derive a port from the name of a job, the same on all of its ranks."""
    digits = re.sub(r"\D", "", job) or "0"
    return FIRST_PORT + int(digits) % PORTS
