"""The recipe's ``launch``: machines, and what a scheduler must know to start the run on them."""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config.field import LIMIT, MAX_BATCH, MOUNT, NAME, OPTION, TEXT, VARIABLE, WORD, key


@dataclass
class LaunchConfig:
    """Machines and scheduler of `moefoundry launch`; training itself reads nothing of it."""

    nodes: int = key(1, "Machines.", ge=1, le=MAX_BATCH, renamed_from=("num_nodes", "nnodes"))
    gpus_per_node: int = key(8, "GPUs of a machine; 0 trains on CPUs.", ge=0, le=1024, renamed_from=("gpus",))
    ranks_per_node: int | None = key(
        None,
        "Ranks of a machine; null is one for each GPU, and one where there is none.",
        ge=1,
        le=1024,
        renamed_from=("nproc_per_node",),
    )
    gpu_type: str | None = key(
        None, "Kind of GPU by the scheduler's name for it, such as H100; skypilot needs it.", pattern=NAME
    )
    cpus_per_node: int | None = key(None, "CPU cores of a machine; null is the scheduler's default.", ge=1)
    memory_per_node: int | None = key(None, "Memory of a machine in GiB; null is the scheduler's default.", ge=1)
    time_limit: str | None = key(
        None,
        "Longest time of an allocation of slurm, such as 24h; the run saves before its end and goes on in another.",
        pattern=LIMIT,
    )
    image: str | None = key(
        None,
        "Container image, which k8s needs; slurm takes it through Pyxis.",
        pattern=WORD,
        renamed_from=("container_image", "docker_image"),
    )
    queue: str | None = key(
        None, "Partition of slurm, or local queue of Kueue on k8s.", pattern=WORD, renamed_from=("partition",)
    )
    account: str | None = key(None, "Account that slurm charges.", pattern=WORD)
    environment: list[str] = key(
        list,
        "Names of environment variables that ranks need; their values are written nowhere.",
        pattern=VARIABLE,
        renamed_from=("env_vars", "env_variables"),
    )
    environment_from: str = key(
        "moefoundry", "Secret of k8s that holds the variables of environment, each under its name.", pattern=NAME
    )
    mounts: list[str] = key(
        list,
        "SOURCE:/PATH, what machines or containers see at PATH: a directory, a volume's name, or with skypilot a URL.",
        pattern=MOUNT,
        renamed_from=("volumes", "container_mounts", "file_mounts"),
    )
    workdir: str | None = key(
        None,
        "Directory of the machines where ranks start, and from which relative paths count; null is this directory with "
        "slurm and local, and the image's or the scheduler's elsewhere.",
        path=True,
    )
    setup: str | None = key(
        None,
        "Shell commands before the ranks start, on every machine; with slurm on the first, whose environment all get.",
        pattern=TEXT,
    )
    spot: bool = key(False, "Take machines of skypilot that may be reclaimed.", renamed_from=("use_spot",))
    grace_seconds: int = key(
        180, "Time that a run has to end its batch and to save, once slurm or k8s stops it.", ge=1, le=86400
    )
    max_restarts: int = key(
        10,
        "Starts after a crash; on k8s and ray after a stop, too. An error of the recipe (status 2) ends the run.",
        ge=0,
        le=1_000_000,
    )
    options: list[str] = key(
        list, "Further options of the scheduler's command, such as --qos=high of sbatch, as they stand.", pattern=OPTION
    )
