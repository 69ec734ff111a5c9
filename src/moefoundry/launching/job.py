"""A run that is to be started by a scheduler: its recipe, and where the files of the launch lie."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from moefoundry.config import Problem, Recipe, dump_recipe, redact_argument
from moefoundry.config.schema_launch import LaunchConfig
from moefoundry.version import __version__

RECIPE_FILE = "recipe.yaml"
MASTER_PORT = 29500
WAIT = ("--wait", "120")
"""Options of `train`: a run that is started again may find the signs of life of one whose machine was lost."""


@dataclass(frozen=True)
class Job:
    """A run for a scheduler.

    Attributes:
        recipe: Checked for the number of ranks; ``autoresume`` is on.
        arguments: The command line that it comes from, for the recipe's first line.
        directory: Where the files of the launch lie; absolute.
        python: Interpreter of this environment; absolute.
    """

    recipe: Recipe
    arguments: tuple[str, ...]
    directory: Path
    python: str

    @property
    def launch(self) -> LaunchConfig:
        return self.recipe.launch or LaunchConfig()

    @property
    def ranks_per_node(self) -> int:
        return ranks_per_node(self.launch)

    @property
    def recipe_path(self) -> str:
        return str(self.directory / RECIPE_FILE)

    @property
    def recipe_text(self) -> str:
        return recipe_text(self.recipe, self.arguments)


@dataclass(frozen=True)
class Written:
    """Files with which a scheduler starts a run, and the command that submits them.

    Attributes:
        files: Name -> text, below the directory of the launch.
        command: Arguments of the command that submits them.
        problems: Keys with which this scheduler cannot start the run.
        notes: What its user should know.
    """

    files: dict[str, str]
    command: list[str]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ranks_per_node(launch: LaunchConfig) -> int:
    """Count the ranks of a machine."""
    return launch.ranks_per_node or launch.gpus_per_node or 1


def recipe_text(recipe: Recipe, arguments: tuple[str, ...]) -> str:
    """Write the recipe that travels with the job: every key, resolved, below the command that it comes from."""
    command = shlex.join(["moefoundry", "launch", *map(redact_argument, arguments)])
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in command)
    return f"# {shown}\n# moefoundry {__version__}\n{dump_recipe(recipe)}"


def fitting_name(name: str, longest: int, lower: bool = False) -> str:
    """Make the name of a run one that a scheduler accepts.

    Args:
        name: Name of the run.
        longest: Most characters that the scheduler allows.
        lower: Allow lower-case letters, digits and ``-`` alone, with a letter first (an RFC 1035 label, which is a
            DNS-1123 one, too). Otherwise upper-case letters, ``.`` and ``_``, too.

    Returns:
        The name itself where it fits; otherwise what is left of it and six digits of its hash, so that two runs do not
        get the same.
    """
    fits = r"[a-z]([a-z0-9-]*[a-z0-9])?" if lower else r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?"
    if len(name) <= longest and re.fullmatch(fits, name):
        return name
    kept = re.sub(r"[^a-z0-9]+", "-", name.lower()) if lower else re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    kept = re.sub(r"^[^A-Za-z]+", "", kept)[: longest - 7].rstrip("-._") or "run"
    return f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def unplaced_run_dir(job: Job) -> list[Problem]:
    """Refuse a relative ``run_dir`` on machines whose ranks start nobody knows where."""
    if job.launch.workdir is not None or Path(job.recipe.run_dir).is_absolute():
        return []
    message = f"{job.recipe.run_dir} counts from an unknown directory of the machines"
    return [Problem("run_dir", message, allowed="an absolute path, or launch.workdir")]


def lost_run_dir(job: Job) -> list[Problem]:
    """Refuse a ``run_dir`` on a disk that ends with the machine or container, where the run could not be resumed."""
    if problems := unplaced_run_dir(job):
        return problems
    path = Path(job.launch.workdir or "/", job.recipe.run_dir)
    if any(path.is_relative_to(mount.rpartition(":")[2]) for mount in job.launch.mounts):
        return []
    if job.launch.nodes == 1 and job.recipe.save_remote is not None:
        return []  # goes on from what it has uploaded
    allowed = "a directory below a path of launch.mounts, which all machines share"
    allowed += "; or save_remote, for one machine" if job.launch.nodes == 1 else ""
    return [Problem("run_dir", f"{path} is lost with the machine", allowed=allowed)]
