"""Shell text of a machine: composer starts its ranks, and a request to stop goes to these alone.

composer and torchrun kill ranks 30 seconds after they themselves were told to end, whatever a save still needs. So
the shell, which the scheduler tells, sends USR1 to the ranks: they end the batch, save, and exit with status 75, and
composer ends by itself.
"""

from __future__ import annotations

import shlex

from moefoundry.launching.job import MASTER_PORT, WAIT, Job

AWAIT = """\
stopped=0
trap stop USR1 TERM
wait "$started"
status=$?
while [ "$stopped" = 1 ]; do # a signal has ended the wait
    stopped=0
    wait "$started"
    status=$?
done
"""
"""Waits for the process ``started``; then ``status`` is its exit status. ``stop`` is called where a signal comes."""

STOP_RANKS = """\
stop() {
    stopped=1
    ranks=$(cat "/proc/$started/task/$started/children")
    # shellcheck disable=SC2086
    kill -USR1 ${ranks:-$started}
}
"""


def preparation(job: Job) -> str:
    """Write ``launch.setup`` so that its failure ends the job; "" without one."""
    return f"set -eo pipefail\n{job.launch.setup.strip()}\nset +e\n\n" if job.launch.setup else ""


def machine_script(job: Job, node_rank: str, address: str, recipe: str) -> str:
    """Write what every machine runs, but for its first line.

    Args:
        job: The run.
        node_rank: Shell text of the machine's number, without blanks, such as ``$JOB_COMPLETION_INDEX``.
        address: Shell text of the host of rank 0.
        recipe: Path of the recipe on the machine.
    """
    count, nodes = job.ranks_per_node, job.launch.nodes
    workdir = f"cd {shlex.quote(job.launch.workdir)} || exit 2\n" if job.launch.workdir else ""
    world = f" --world_size {count * nodes}" if nodes > 1 else ""
    if nodes > 1:
        world += f' --node_rank "{node_rank}" --base_rank "$(({node_rank} * {count}))"'
        world += f' --master_addr "{address}" --master_port {MASTER_PORT}'
    return (
        f"{workdir}{preparation(job)}"
        f"composer -n {count}{world} \\\n    -m moefoundry train {shlex.quote(recipe)} {' '.join(WAIT)} &\n"
        f'started=$!\n{STOP_RANKS}{AWAIT}exit "$status"\n'
    )
