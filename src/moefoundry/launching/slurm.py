"""A batch script of Slurm. ``srun`` starts the ranks, which read their place from its variables.

Slurm sends USR1 to the script some time before the limit (``--signal=B:USR1@N``), and TERM to all where it preempts.
Either way the ranks save and end with status 75; the script then puts the job back into the queue.
"""

from __future__ import annotations

import shlex

from moefoundry.config import Problem
from moefoundry.config.errors import EXIT_STOPPED, EXIT_USER_ERROR
from moefoundry.launching.job import WAIT, Job, Written, fitting_name
from moefoundry.launching.shell import AWAIT, preparation

SCRIPT = "job.sbatch"
IGNORES = frozenset(["spot", "environment_from"])
BEFORE_TRAINING = 128 + 10  # ended by USR1 itself

STOP = """\
stop() {
    stopped=1
    kill -USR1 "$started" # srun hands it on to every rank
}
"""


def slurm(job: Job) -> Written:
    """Write a batch script; it is submitted with ``sbatch``."""
    places = {"launch": str(job.directory), "launch.workdir": job.launch.workdir or "", "python": job.python}
    problems = [
        Problem(name, f"{path!r}: sbatch reads no path with a quote, a backslash or a line break")
        for name, path in places.items()
        if any(char in path or not path.isprintable() for char in "\"'\\")
    ]
    text = f"#!/bin/bash\n{_directives(job)}\n{preparation(job)}{_step(job)}{_requeue(job)}"
    notes = (
        ["launch.mounts means nothing to slurm without launch.image"]
        if job.launch.mounts and not job.launch.image
        else []
    )
    return Written({SCRIPT: text}, ["sbatch", str(job.directory / SCRIPT)], problems, notes)


def minutes(limit: str) -> int:
    """Turn a limit such as ``24h`` into minutes."""
    return int(limit[:-1]) * {"m": 1, "h": 60, "d": 1440}[limit[-1]]


def _directives(job: Job) -> str:
    launch, tasks = job.launch, job.ranks_per_node
    gpus = f"{launch.gpu_type}:{launch.gpus_per_node}" if launch.gpu_type else launch.gpus_per_node
    log = str(job.directory).replace("%", "%%")
    lines = [
        f"--job-name={fitting_name(job.recipe.run_name, 200)}",
        f"--nodes={launch.nodes}",
        f"--ntasks-per-node={tasks}",
        *([f"--gpus-per-node={gpus}"] if launch.gpus_per_node else []),
        *([f"--cpus-per-task={max(1, launch.cpus_per_node // tasks)}"] if launch.cpus_per_node else []),
        *([f"--mem={launch.memory_per_node}G"] if launch.memory_per_node else []),
        *([f"--time={minutes(launch.time_limit)}"] if launch.time_limit else []),
        *([f"--partition={launch.queue}"] if launch.queue else []),
        *([f"--account={launch.account}"] if launch.account else []),
        *([f'--chdir="{launch.workdir}"'] if launch.workdir else []),
        f'--output="{log}/%j.log"',
        "--open-mode=append",
        "--export=ALL",
        "--requeue",
        f"--signal=B:USR1@{launch.grace_seconds}",
        *launch.options,
    ]
    return "".join(f"#SBATCH {line}\n" for line in lines)


def _step(job: Job) -> str:
    launch = job.launch
    container = []
    if launch.image:
        mounts = ",".join([*launch.mounts, f"{job.directory}:{job.directory}"])
        container = [f"--container-image={launch.image}", f"--container-mounts={mounts}"]
        container += [f"--container-workdir={launch.workdir}"] if launch.workdir else []
    cpus = [f"--cpus-per-task={max(1, launch.cpus_per_node // job.ranks_per_node)}"] if launch.cpus_per_node else []
    python = "python" if launch.setup or launch.image else job.python
    options = shlex.join(["--kill-on-bad-exit=1", "--distribution=block", *cpus, *container])
    program = shlex.join([python, "-m", "moefoundry", "train", job.recipe_path, *WAIT])
    return f"srun {options} \\\n    {program} &\nstarted=$!\n{STOP}{AWAIT}\n"


def _requeue(job: Job) -> str:
    return f"""\
requeue() {{
    trap '' USR1 TERM
    # not where the job was cancelled, or is put back already, as after a preemption
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
case $status in
0 | {EXIT_USER_ERROR}) ;; # done; an error that its user must put right
{EXIT_STOPPED} | {BEFORE_TRAINING}) requeue ;; # stopped and saved; stopped before training
*) if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.launch.max_restarts} ]; then requeue; fi ;;
esac
exit "$status"
"""
