"""``moefoundry checkpoint``: list, verify, show and delete the checkpoints of a run. Heavy imports happen inside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moefoundry.cli.arguments import Group, either, former_option, json_option, place
from moefoundry.cli.exits import EXIT_NO

if TYPE_CHECKING:
    from moefoundry.checkpoint.manifest import Manifest


@click.group("checkpoint", cls=Group)
def command() -> None:
    """Look after the checkpoints of a run; see docs/checkpoints.md."""


def _run_argument(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.argument("run", type=_existing, metavar="RUN_OR_DIR", help=f"{text}; a path or a URL.")


def _existing(text: str) -> str:
    from moefoundry.config.errors import UserError
    from moefoundry.config.urls import is_url

    path = place(text)
    if not is_url(path) and not Path(path).is_dir():
        raise UserError(f"{path}: no such directory")
    return path


@command.command("list", short_help="One line for each checkpoint.")
@_run_argument("A run, or a directory of checkpoints")
@json_option
def list_(run: str, as_json: bool) -> None:
    """Print one line for each checkpoint: when it was saved, its size, its mesh, and whether it is complete."""
    from moefoundry.checkpoint.fetch import checkpoints_at
    from moefoundry.config.urls import is_url

    with checkpoints_at(run) as path:
        found = [_facts(directory, is_url(run)) for directory in _directories(path, run)]
    if as_json:
        print(json.dumps({"checkpoints": found}, indent=2))
        return
    print(f"{'checkpoint':24} {'saved at':26} {'size':>10}  {'mesh':36} state")
    for facts in found:
        size = "" if facts["bytes"] is None else _size(facts["bytes"])
        mesh = _mesh(facts["mesh"], facts["world_size"])
        print(f"{facts['name']:24} {facts['saved_at'] or '':26} {size:>10}  {mesh:36} {facts['state']}")


def _facts(directory: Path, size_unknown: bool) -> dict[str, Any]:
    from moefoundry.checkpoint.manifest import Manifest
    from moefoundry.config.errors import UserError

    facts: dict[str, Any] = {"name": directory.resolve().name, "state": "committed"}
    try:
        facts |= _origin(Manifest.read(directory))
    except UserError:
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        facts |= {"state": "not committed", "batch": None, "saved_at": None, "bytes": None if size_unknown else size}
        facts |= {"mesh": {}, "world_size": None}
    return facts | ({"state": "quarantined"} if ".quarantine-" in directory.name else {})


def _origin(manifest: Manifest) -> dict[str, Any]:
    origin = manifest.origin
    return {
        "batch": origin.batch,
        "saved_at": origin.saved_at,
        "bytes": manifest.nbytes,
        "mesh": dict(origin.mesh),
        "world_size": origin.world_size,
    }


@command.command(short_help="Read every byte; exit status 1 if any is not as saved.")
@_run_argument("A checkpoint or a run")
@json_option
def verify(run: str, as_json: bool) -> int:
    """Read every byte; exit status 1 if any is not as it was saved."""
    from moefoundry.checkpoint.fetch import checkpoints_at, fetched_damage
    from moefoundry.checkpoint.store import STAGING_SUFFIX
    from moefoundry.config.secrets import redact

    found: dict[str, list[str]] = {}
    with checkpoints_at(run) as path:
        named = str(path), redact(run.rstrip("/"))
        for directory in _directories(path, run):
            if directory.name.endswith(STAGING_SUFFIX):
                continue
            problems = [problem.replace(*named) for problem in fetched_damage(directory)]
            name = str(directory).replace(*named)
            found[name] = problems
            if not as_json:
                print(*(problems or [f"{name}: intact"]), sep="\n")
    intact = not any(found.values())
    if as_json:
        checkpoints = [{"path": name, "problems": problems} for name, problems in found.items()]
        print(json.dumps({"intact": intact, "checkpoints": checkpoints}, indent=2))
    return 0 if intact else EXIT_NO


@command.command(short_help="Where it comes from, and its tensors.")
@_run_argument("A checkpoint, or a run (its newest)")
@json_option
def show(run: str, as_json: bool) -> None:
    """Print where a checkpoint comes from, its metrics and its tensors."""
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.format import METADATA_FILE, read_metadata, stored_tensors
    from moefoundry.checkpoint.manifest import Manifest
    from moefoundry.checkpoint.store import find_checkpoint
    from moefoundry.config.secrets import redact
    from moefoundry.config.urls import is_url

    with checkpoint_at(run) as path:
        directory = path if is_url(run) else find_checkpoint(str(path))
        manifest = Manifest.read(directory)
        manifest.check(METADATA_FILE, 0, manifest.size(METADATA_FILE))
        entries = stored_tensors(read_metadata(directory))
    origin, name = manifest.origin, redact(run) if is_url(run) else str(directory)
    tensors = {
        key: {"dtype": str(tensor.spec.dtype).removeprefix("torch."), "shape": list(tensor.spec.shape)}
        for key, tensor in sorted(entries.items())
    }
    if as_json:
        more = {"recipe": origin.recipe, "versions": dict(origin.versions), "metrics": dict(origin.metrics)}
        print(json.dumps({"path": name} | _origin(manifest) | more | {"tensors": tensors}, indent=2))
        return
    print(f"{name}: batch {origin.batch}, saved at {origin.saved_at}, {_size(manifest.nbytes)}")
    print(f"mesh {_mesh(origin.mesh, origin.world_size)}, recipe {origin.recipe}")
    print(", ".join(f"{name} {version}" for name, version in origin.versions.items()))
    for name, value in origin.metrics.items():
        print(f"{name} {value:.6g}")
    for name, tensor in tensors.items():
        print(f"  {name}  {tensor['dtype']} {tensor['shape']}")


@command.command(short_help="Delete one checkpoint.")
@_run_argument("A checkpoint, or a run with --batch")
@click.option("--batch", type=int, metavar="N", callback=either, help="Batch of the checkpoint of a run.")
@former_option("--step", name="batch", kind=int)
@click.option("--yes", is_flag=True, help="Do it.")
def delete(run: str, batch: int | None, yes: bool) -> None:
    """Delete one checkpoint."""
    from moefoundry.checkpoint.manifest import is_committed
    from moefoundry.checkpoint.store import entries, in_use, remove
    from moefoundry.config.errors import UserError
    from moefoundry.config.urls import is_url

    if is_url(run):
        raise UserError(f"{run}: checkpoints in a store are deleted with the store's own tools")
    directory = Path(run).resolve()
    if batch is not None:
        named = [entry for entry in _directories(Path(run), run) if entry.name == f"ba{batch}"]
        if not named:
            raise UserError(f"{run}: no checkpoint of batch {batch}")
        (directory,) = named
    elif not is_committed(directory) and directory not in entries(directory.parent):
        raise UserError(f"{run}: no checkpoint; name one, or --batch of a run")
    if not yes:
        raise UserError(f"this deletes {directory}; say --yes")
    if in_use(directory):
        raise UserError(f"{directory} is in use by another process")
    try:
        remove(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be deleted: {error.strerror}") from error
    print(f"deleted {directory}", file=sys.stderr)


def _directories(path: Path, name: str) -> list[Path]:
    """List the checkpoint that ``path`` is; or all of a run, complete or not, oldest first.

    Raises:
        UserError: There is none; it is called ``name``.
    """
    from moefoundry.checkpoint.manifest import COMMIT_FILE, MANIFEST_FILE
    from moefoundry.checkpoint.store import CHECKPOINTS, entries
    from moefoundry.config.errors import UserError

    if any((path / file).exists() for file in (COMMIT_FILE, MANIFEST_FILE)):
        return [path]
    found = [entry for root in (path / CHECKPOINTS, path) for entry in entries(root)]
    if not found:
        raise UserError(f"{name}: no checkpoints there")
    return found


def _mesh(degrees: Mapping[str, int], world_size: int | None) -> str:
    ranks = f"{world_size} rank(s)" if world_size is not None else ""
    return ", ".join(f"{axis} {degree}" for axis, degree in degrees.items()) or ranks


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
