"""Program of a Ray job: one task a machine, which runs composer there, and all of them again where one fails.

``python -m moefoundry.launching.on_ray RECIPE``, as ``ray job submit`` starts it in the directory that it uploaded.
Ray places the tasks, and brings back those whose machine is lost.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from moefoundry.config import load_recipe
from moefoundry.config.errors import UserError
from moefoundry.config.schema_launch import LaunchConfig
from moefoundry.launching.job import STOPPED, USER_ERROR, ranks_per_node

LOST = -1  # status of a machine that has gone


def main(path: str) -> int:
    """Run a recipe on the cluster of this job.

    Returns:
        0 when the run is done; otherwise the exit status of the last attempt.

    Raises:
        UserError: The cluster has too few machines or GPUs.
    """
    import ray

    recipe = load_recipe(path, stored=True)
    launch, text = recipe.launch or LaunchConfig(), Path(path).read_text(encoding="utf-8")
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True)
    machine = {"CPU": float(launch.cpus_per_node or 1)}
    machine |= {"GPU": float(launch.gpus_per_node)} if launch.gpus_per_node else {}
    group = ray.util.placement_group([machine] * launch.nodes, strategy="STRICT_SPREAD")
    if not group.wait(timeout_seconds=3600):
        raise UserError(f"ray: no {launch.nodes} machines with {machine} within an hour")
    status = LOST
    for attempt in range(launch.max_restarts + 1):
        if attempt:
            print(f"attempt {attempt + 1}: the last one ended with status {status}", flush=True)
        status = _attempt(group, machine, launch, text)
        if status in (0, USER_ERROR):
            break
    return status if 0 <= status < 256 else 1


def _attempt(group: object, machine: dict[str, float], launch: LaunchConfig, text: str) -> int:
    """Start all machines' ranks; return 0 if all end well, else the status of the first that does not."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def task(function: object, number: int, **resources: float) -> object:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        return ray.remote(max_retries=0, scheduling_strategy=place, **resources)(function)

    whole = {"num_cpus": machine["CPU"], "num_gpus": machine.get("GPU", 0.0)}
    try:
        address, port = ray.get(task(_address, 0, num_cpus=0).remote())
        pending = [task(_ranks, n, **whole).remote(launch, text, n, address, port) for n in range(launch.nodes)]
    except ray.exceptions.RayError:
        return LOST
    everything, status = list(pending), 0
    while pending and not status:
        (done,), pending = ray.wait(pending)
        try:
            status = ray.get(done)
        except ray.exceptions.RayError:
            status = LOST
    if status == STOPPED:
        ray.wait(pending, num_returns=len(pending), timeout=launch.grace_seconds) if pending else None
    for reference in everything:
        ray.cancel(reference, force=True)
    return status


def _address() -> tuple[str, int]:
    """Give the address of this machine and a free port of it."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _ranks(launch: LaunchConfig, text: str, number: int, address: str, port: int) -> int:
    """Run the ranks of one machine; return composer's status."""
    if lacking := [name for name in launch.environment if name not in os.environ]:
        print(f"error: launch.environment: {', '.join(lacking)} not set on {socket.gethostname()}", file=sys.stderr)
        return USER_ERROR
    recipe = Path("recipe.yaml").absolute()
    recipe.write_text(text, encoding="utf-8")
    count = ranks_per_node(launch)
    world = ["--world_size", count * launch.nodes, "--node_rank", number, "--base_rank", count * number]
    world += ["--master_addr", address, "--master_port", port]
    composer = ["composer", "-n", count, *world, "-m", "moefoundry", "train", recipe]
    script = f"set -eo pipefail\n{launch.setup or ''}\nexec {shlex.join(map(str, composer))}"
    return subprocess.run(["bash", "-c", script], cwd=launch.workdir, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
