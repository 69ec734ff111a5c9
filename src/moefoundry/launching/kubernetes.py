"""A JobSet of Kubernetes (jobset.x-k8s.io), with the recipe in a ConfigMap.

Each machine is a pod of one indexed Job. Where a pod fails, or is evicted, the JobSet starts all of them again, and the
run goes on from its checkpoint; a pod that ends with status 2, an error that its user must put right, ends the JobSet.
"""

from __future__ import annotations

from typing import Any

from moefoundry.config import Problem
from moefoundry.config.errors import EXIT_USER_ERROR
from moefoundry.launching.job import MASTER_PORT, RECIPE_FILE, Job, Written, fitting_name, lost_run_dir
from moefoundry.launching.manifest import to_yaml
from moefoundry.launching.shell import machine_script

MANIFEST = "jobset.yaml"
GROUP = "node"  # name of the Job in the JobSet
CONTAINER = "ranks"
RECIPE_DIRECTORY = "/etc/moefoundry"
LONGEST_LABEL = 63
IGNORES = frozenset(["time_limit", "account", "spot"])


def kubernetes(job: Job) -> Written:
    """Write a manifest of two objects; it is submitted with ``kubectl create``, which overwrites nothing."""
    launch = job.launch
    pod_suffix = f"-{GROUP}-0-{launch.nodes - 1}-abcde"
    name = fitting_name(job.recipe.run_name, LONGEST_LABEL - len(pod_suffix), lower=True)
    problems = lost_run_dir(job)
    if launch.image is None:
        problems.append(Problem("launch.image", "missing: what the containers of k8s are made of"))
    text = to_yaml(_config_map(job, name), _jobset(job, name))
    command = ["kubectl", "create", *launch.options, "-f", str(job.directory / MANIFEST)]
    notes = []
    if launch.environment:
        notes.append(
            f"the Secret {launch.environment_from} must hold {', '.join(launch.environment)} "
            "(kubectl create secret generic)"
        )
    return Written({MANIFEST: text}, command, problems, notes)


def _config_map(job: Job, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "immutable": True,
        "data": {RECIPE_FILE: job.recipe_text},
    }


def _jobset(job: Job, name: str) -> dict[str, Any]:
    launch = job.launch
    queue = {"labels": {"kueue.x-k8s.io/queue-name": launch.queue}} if launch.queue else {}
    user_error = {
        "action": "FailJob",
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_USER_ERROR]},
    }
    failed = {"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    template = {
        "spec": {
            "parallelism": launch.nodes,
            "completions": launch.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # the JobSet starts all machines again, not the Job one
            "podFailurePolicy": {"rules": [user_error]},
            "template": {"spec": _pod(job, name)},
        }
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, **queue},
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": launch.max_restarts,
                "rules": [failed],
            },
            "replicatedJobs": [{"name": GROUP, "replicas": 1, "template": template}],
        },
    }


def _pod(job: Job, name: str) -> dict[str, Any]:
    launch = job.launch
    volumes = [{"name": "recipe", "configMap": {"name": name}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    seen = [{"name": "recipe", "mountPath": RECIPE_DIRECTORY, "readOnly": True}]
    seen.append({"name": "shm", "mountPath": "/dev/shm"})  # NCCL and loader processes share memory
    for number, mount in enumerate(launch.mounts):
        source, _, path = mount.rpartition(":")
        is_path = source.startswith("/")
        kind = {"hostPath": {"path": source}} if is_path else {"persistentVolumeClaim": {"claimName": source}}
        volumes.append({"name": f"mount-{number}", **kind})
        seen.append({"name": f"mount-{number}", "mountPath": path})
    address = f"{name}-{GROUP}-0-0.{name}"
    script = machine_script(job, "$JOB_COMPLETION_INDEX", address, f"{RECIPE_DIRECTORY}/{RECIPE_FILE}")
    container = {
        "name": CONTAINER,
        "image": launch.image,
        "command": ["bash", "-c", script],
        "env": [_variable(variable, launch.environment_from) for variable in launch.environment],
        "ports": [{"containerPort": MASTER_PORT}],
        "resources": _resources(job),
        "volumeMounts": seen,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace_seconds,
        **({"nodeSelector": {"nvidia.com/gpu.product": launch.gpu_type}} if launch.gpu_type else {}),
        "containers": [container],
        "volumes": volumes,
    }


def _variable(name: str, secret: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}}


def _resources(job: Job) -> dict[str, dict[str, Any]]:
    launch = job.launch
    requests = {"cpu": launch.cpus_per_node, "memory": launch.memory_per_node and f"{launch.memory_per_node}Gi"}
    asked = {resource: str(amount) for resource, amount in requests.items() if amount}
    return {
        **({"requests": asked} if asked else {}),
        **({"limits": {"nvidia.com/gpu": launch.gpus_per_node}} if launch.gpus_per_node else {}),
    }
