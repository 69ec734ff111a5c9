"""A job of a Ray cluster: ``ray job submit`` brings the recipe there, and starts :mod:`moefoundry.launching.on_ray`."""

from __future__ import annotations

import json

from moefoundry.launching.job import RECIPE_FILE, Job, Written, fitting_name, unplaced_run_dir

IGNORES = frozenset(
    ["gpu_type", "memory_per_node", "time_limit", "image", "queue", "account", "environment_from", "mounts", "spot"]
)


def ray(job: Job) -> Written:
    """Write no file besides the recipe, which Ray uploads with its directory."""
    launch = job.launch
    name = fitting_name(job.recipe.run_name, 200)
    command = ["ray", "job", "submit", "--no-wait", "--metadata-json", json.dumps({"name": name})]
    command += ["--working-dir", str(job.directory), *launch.options]
    notes = []
    if launch.environment:
        notes.append(f"{', '.join(launch.environment)} must be set where the cluster's nodes were started")
    entry = ["--", "python", "-m", "moefoundry.launching.on_ray", RECIPE_FILE]
    return Written({}, [*command, *entry], unplaced_run_dir(job), notes)
