"""From a checked recipe to files on disk, and to the scheduler."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from moefoundry.config import Problem, Recipe
from moefoundry.config.errors import ConfigError, UserError
from moefoundry.config.layers import leaves_of
from moefoundry.config.schema_launch import LaunchConfig
from moefoundry.config.secrets import redact
from moefoundry.config.spec import plain
from moefoundry.launching import kubernetes, local, ray_job, skypilot, slurm
from moefoundry.launching.job import RECIPE_FILE, Job, Written, ranks_per_node, recipe_text


@dataclass(frozen=True)
class Scheduler:
    """A scheduler.

    Attributes:
        write: Makes its files.
        ignores: Keys of ``launch`` that mean nothing to it.
        takes_environment: Variables come from the environment of the command that submits.
    """

    write: Callable[[Job], Written]
    ignores: Collection[str]
    takes_environment: bool


SCHEDULERS = {
    "slurm": Scheduler(slurm.slurm, slurm.IGNORES, True),
    "skypilot": Scheduler(skypilot.skypilot, skypilot.IGNORES, True),
    "k8s": Scheduler(kubernetes.kubernetes, kubernetes.IGNORES, False),
    "ray": Scheduler(ray_job.ray, ray_job.IGNORES, False),
    "local": Scheduler(local.local, local.IGNORES, True),
}


@dataclass(frozen=True)
class Launch:
    """A run whose files are made, and not yet written.

    Attributes:
        directory: Where they go; absolute.
        files: Name -> text; the recipe is one of them.
        command: Arguments of the command that submits them.
        workdir: Directory in which the command is run; None for this one.
        notes: What its user should know.
    """

    directory: Path
    files: dict[str, str]
    command: list[str]
    workdir: str | None
    notes: list[str]


def world_size(launch: LaunchConfig | None) -> int:
    """Count the ranks of a launch."""
    launch = launch or LaunchConfig()
    return launch.nodes * ranks_per_node(launch)


def make_launch(recipe: Recipe, scheduler: str, arguments: tuple[str, ...], output: Path | None = None) -> Launch:
    """Make the files of a launch.

    Args:
        recipe: Checked for :func:`world_size` ranks; with ``autoresume``.
        scheduler: A name of :data:`SCHEDULERS`.
        arguments: The command line that the recipe comes from.
        output: Directory of the files; None is one below ``launches`` that is named by run, scheduler and content.

    Raises:
        ConfigError: The scheduler cannot start this recipe, or a file would hold a secret.
    """
    chosen, python = SCHEDULERS[scheduler], sys.executable
    content = "\n".join([recipe_text(recipe, arguments), scheduler, python])
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    directory = (output or Path("launches", f"{recipe.run_name}-{scheduler}-{digest}")).absolute()
    job = Job(recipe, arguments, directory, python)
    written = chosen.write(job)
    problems = [*_secrets(recipe), *written.problems]
    if scheduler != "local" and job.launch.workdir is not None and not Path(job.launch.workdir).is_absolute():
        problems.append(Problem("launch.workdir", f"{job.launch.workdir} is relative", allowed="an absolute path"))
    if chosen.takes_environment:
        problems += [
            Problem("launch.environment", f"{name} is not set here")
            for name in job.launch.environment
            if name not in os.environ
        ]
    if problems:
        raise ConfigError(problems, f"launch on {scheduler}")
    default = plain(LaunchConfig())
    unused = [key for key, value in plain(job.launch).items() if value != default[key] and key in chosen.ignores]
    notes = [*written.notes, *(f"launch.{key} means nothing to {scheduler}" for key in unused)]
    files = {RECIPE_FILE: job.recipe_text, **written.files}
    return Launch(directory, files, written.command, job.launch.workdir if scheduler == "local" else None, notes)


def write(launch: Launch) -> None:
    """Write the files of a launch; those that are there already must be the same.

    Raises:
        UserError: A file of this name has other content.
    """
    launch.directory.mkdir(parents=True, exist_ok=True)
    for name, text in launch.files.items():
        path = launch.directory / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: is of another launch; choose another directory with --output")
        path.write_text(text, encoding="utf-8")


def submit(launch: Launch) -> str:
    """Hand the files to the scheduler. Returns what its command prints.

    Raises:
        UserError: The command is not installed here, or fails.
    """
    _program(launch)
    done = subprocess.run(launch.command, capture_output=True, text=True, check=False, cwd=launch.workdir)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        message = f"{launch.command[0]}: exit status {done.returncode}: {''.join(said)}"
        raise UserError(f"{message}; the files are in {launch.directory}")
    return redact(done.stdout.strip())


def become(launch: Launch) -> None:
    """Run the command of a launch in place of this process.

    Raises:
        UserError: The command is not installed here.
    """
    program = _program(launch)
    if launch.workdir is not None:
        os.chdir(launch.workdir)
    sys.stdout.flush()
    os.execv(program, launch.command)


def _program(launch: Launch) -> str:
    program = shutil.which(launch.command[0])
    if program is None:
        shown = shlex.join(launch.command)
        raise UserError(f"{launch.command[0]}: no such command on this machine; where there is one: {shown}")
    return program


def _secrets(recipe: Recipe) -> list[Problem]:
    """Find values that look like secrets, which the recipe of a job would hold in plain text."""
    leaves = leaves_of(plain(recipe))
    texts = [
        (".".join(path), text)
        for path, value in leaves.items()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    ]
    message = "looks like a secret, which no file of a job may hold; name a variable in launch.environment instead"
    return [Problem(path, message) for path, text in texts if redact(text, path) != text]
