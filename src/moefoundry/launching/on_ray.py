"""Program of a Ray job: one task a machine, which runs composer there, and all of them again where one fails.

``python -m moefoundry.launching.on_ray RECIPE``, as ``ray job submit`` starts it in the directory that it uploaded.
Ray places the tasks, and finds machines for those whose own is lost.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from moefoundry.config import load_recipe
from moefoundry.config.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from moefoundry.config.schema_launch import LaunchConfig
from moefoundry.launching.job import RECIPE_FILE, WAIT, ranks_per_node

LOST = 255  # status of a machine that has gone
PLACING_SECONDS = 3600
ENDING_SECONDS = 60  # composer needs 30 to end its ranks


def main(path: str) -> int:
    """Run a recipe on the cluster of this job.

    Returns:
        The exit status of the last attempt; 0 when the run is done.

    Raises:
        UserError: The cluster has too few machines or GPUs.
    """
    import ray

    recipe = load_recipe(path, stored=True)
    launch, text = recipe.launch or LaunchConfig(), Path(path).read_text(encoding="utf-8")
    ray.init(address="auto", logging_level="ERROR")
    machine = {"CPU": float(launch.cpus_per_node or 1)}
    machine |= {"GPU": float(launch.gpus_per_node)} if launch.gpus_per_node else {}
    group = ray.util.placement_group([machine] * launch.nodes, strategy="STRICT_SPREAD")
    if not group.wait(timeout_seconds=PLACING_SECONDS):
        raise UserError(f"ray: no {launch.nodes} machines with {machine} within {PLACING_SECONDS // 60} minutes")
    status = LOST
    for attempt in range(launch.max_restarts + 1):
        if attempt:
            print(f"start {attempt + 1}: the last one ended with status {status}", flush=True)
        status = _attempt(group, machine, launch, text)
        if status in (0, EXIT_USER_ERROR):
            break
    return status


def _attempt(group: Any, machine: dict[str, float], launch: LaunchConfig, text: str) -> int:
    """Start the ranks of all machines; return 0 if all end well, else the status of the first that does not."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def task(function: Any, number: int, **resources: float) -> Any:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        return ray.remote(max_retries=0, scheduling_strategy=place, **resources)(function)

    whole = {"num_cpus": machine["CPU"], "num_gpus": machine.get("GPU", 0.0)}
    try:
        address, port = ray.get(task(_address, 0, num_cpus=0).remote())
    except ray.exceptions.RayError:
        return LOST
    tasks = [task(_ranks, n, **whole).remote(launch, text, n, address, port) for n in range(launch.nodes)]
    running, status = tasks, 0
    while running and not status:
        (done,), running = ray.wait(running)
        try:
            status = ray.get(done)
        except ray.exceptions.RayError:
            status = LOST
    if running and status == EXIT_STOPPED:  # the others have saved, too, and are about to end
        _, running = ray.wait(running, num_returns=len(running), timeout=launch.grace_seconds)
    for reference in running:
        ray.cancel(reference)
    if running:
        ray.wait(running, num_returns=len(running), timeout=ENDING_SECONDS)
    return status


def _address() -> tuple[str, int]:
    """Give the address of this machine and a free port of it."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _ranks(launch: LaunchConfig, text: str, number: int, address: str, port: int) -> int:
    """Run the ranks of one machine, and end them where the task is cancelled. Returns composer's status."""
    if lacking := [name for name in launch.environment if name not in os.environ]:
        print(f"error: launch.environment: {', '.join(lacking)} not set on {socket.gethostname()}", file=sys.stderr)
        return EXIT_USER_ERROR
    recipe = Path(f"machine{number}", RECIPE_FILE).absolute()
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(text, encoding="utf-8")
    count = ranks_per_node(launch)
    world = ["--world_size", count * launch.nodes, "--node_rank", number, "--base_rank", count * number]
    world += ["--master_addr", address, "--master_port", port]
    composer = ["composer", "-n", count, *world, "-m", "moefoundry", "train", recipe, *WAIT]
    script = f"set -eo pipefail\n{launch.setup or ''}\nexec {shlex.join(map(str, composer))}"
    process = subprocess.Popen(["bash", "-c", script], cwd=launch.workdir)
    try:
        while True:
            try:
                status = process.wait(timeout=1)  # in short waits, which a cancellation ends
                return status if status >= 0 else 128 - status
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
