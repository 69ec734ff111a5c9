"""A managed job of SkyPilot, which finds machines, and finds others where those are reclaimed.

The recipe stands in the command itself, so that no bucket is needed to bring it to the machines.
"""

from __future__ import annotations

from typing import Any

from moefoundry.config import Problem
from moefoundry.config.errors import EXIT_STOPPED
from moefoundry.config.urls import is_url
from moefoundry.launching.job import Job, Written, fitting_name, lost_run_dir
from moefoundry.launching.manifest import to_yaml
from moefoundry.launching.shell import machine_script

TASK = "task.yaml"
RECIPE = "/tmp/moefoundry-recipe.yaml"
IGNORES = frozenset(["time_limit", "queue", "account", "environment_from", "grace_seconds"])


def skypilot(job: Job) -> Written:
    """Write a task; it is submitted with ``sky jobs launch``, which takes the values of variables from here."""
    launch = job.launch
    problems = lost_run_dir(job)
    if launch.gpus_per_node and launch.gpu_type is None:
        problems.append(Problem("launch.gpu_type", "missing: kind of GPU", allowed="one of `sky show-gpus`"))
    name = fitting_name(job.recipe.run_name, 60)
    mounts = dict(mount.rpartition(":")[::2][::-1] for mount in launch.mounts)
    files = {path: _source(source) for path, source in mounts.items() if not _is_volume(source)}
    volumes = {path: source for path, source in mounts.items() if _is_volume(source)}
    task = {
        "name": name,
        "num_nodes": launch.nodes,
        "resources": _resources(job),
        **({"file_mounts": files} if files else {}),
        **({"volumes": volumes} if volumes else {}),
        **({"secrets": dict.fromkeys(launch.environment)} if launch.environment else {}),
        "run": _run(job),
    }
    secrets = [word for variable in launch.environment for word in ("--secret", variable)]
    command = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", name, *secrets, *launch.options]
    return Written({TASK: to_yaml(task)}, [*command, str(job.directory / TASK)], problems)


def _is_volume(source: str) -> bool:
    return not is_url(source) and not source.startswith((".", "/", "~"))


def _source(source: str) -> str | dict[str, str]:
    return {"source": source, "mode": "MOUNT"} if is_url(source) else source


def _resources(job: Job) -> dict[str, Any]:
    launch = job.launch
    return {
        **({"accelerators": {launch.gpu_type: launch.gpus_per_node}} if launch.gpus_per_node else {}),
        **({"cpus": f"{launch.cpus_per_node}+"} if launch.cpus_per_node else {}),
        **({"memory": f"{launch.memory_per_node}+"} if launch.memory_per_node else {}),
        **({"image_id": f"docker:{launch.image}"} if launch.image else {}),
        "use_spot": launch.spot,
        "job_recovery": {"max_restarts_on_errors": launch.max_restarts, "recover_on_exit_codes": [EXIT_STOPPED]},
    }


def _run(job: Job) -> str:
    text, end = job.recipe_text, "END_OF_RECIPE"
    while end in text:
        end += "_"
    ranks = machine_script(job, "$SKYPILOT_NODE_RANK", "${SKYPILOT_NODE_IPS%%$'\\n'*}", RECIPE)
    return f"cat > {RECIPE} <<'{end}'\n{text}{end}\n{ranks}"
