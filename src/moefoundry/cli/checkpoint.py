"""``moefoundry checkpoint``: look at the checkpoints of a run, verify and delete them. Heavy imports happen inside."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefoundry.cli.arguments import place
from moefoundry.cli.exits import EXIT_NO
from moefoundry.config.errors import UserError
from moefoundry.config.spec import redact
from moefoundry.config.urls import is_url

if TYPE_CHECKING:
    from moefoundry.checkpoint.manifest import Manifest


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "checkpoint",
        help="list, verify, show and delete checkpoints",
        description="Look after the checkpoints of a run; see docs/checkpoints.md.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _action(actions, "list", "one line for each", "a run, or a directory of checkpoints")
    _action(actions, "verify", "read every byte; exit status 1 if any is not as saved", "a checkpoint or a run")
    _action(actions, "show", "where it comes from, and its tensors", "a checkpoint, or a run (its newest)")
    delete = _action(actions, "delete", "delete one checkpoint", "a checkpoint, or a run with --step")
    delete.add_argument("--step", type=int, metavar="N", help="batch of the checkpoint of a run")
    delete.add_argument("--yes", action="store_true", help="do it")


def run(args: argparse.Namespace) -> int:
    actions = {"list": _list, "verify": _verify, "show": _show, "delete": _delete}
    if not is_url(args.path) and not Path(args.path).is_dir():
        raise UserError(f"{args.path}: no such directory")
    return actions[args.action](args)


def _action(actions: Any, name: str, text: str, path: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("path", type=place, metavar="RUN_OR_DIR", help=f"{path}; or a URL")
    return parser


def _list(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.fetch import checkpoints_at

    with checkpoints_at(args.path) as path:
        directories = _directories(path, args.path)
        print(f"{'checkpoint':24} {'saved at':26} {'size':>10}  {'mesh':36} state")
        for directory in directories:
            print(f"{directory.resolve().name:24} {_row(directory, is_url(args.path))}")
    return 0


def _row(directory: Path, size_unknown: bool) -> str:
    """When, how large, which mesh, and whether it counts."""
    from moefoundry.checkpoint.manifest import Manifest

    try:
        manifest = Manifest.read(directory)
    except UserError:
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        cells, state = ("", "" if size_unknown else _size(size), ""), "not committed"
    else:
        cells, state = (manifest.origin.saved_at, _size(manifest.nbytes), _mesh(manifest)), "committed"
    state = "quarantined" if ".quarantine-" in directory.name else state
    return f"{cells[0]:26} {cells[1]:>10}  {cells[2]:36} {state}"


def _verify(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.fetch import checkpoints_at, fetched_damage
    from moefoundry.checkpoint.store import STAGING_SUFFIX

    damaged = False
    with checkpoints_at(args.path) as path:
        for directory in _directories(path, args.path):
            if directory.name.endswith(STAGING_SUFFIX):
                continue
            problems = fetched_damage(directory)
            damaged |= bool(problems)
            lines = problems or [f"{directory}: intact"]
            print(*(line.replace(str(path), redact(args.path.rstrip("/"))) for line in lines), sep="\n")
    return EXIT_NO if damaged else 0


def _show(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.format import METADATA_FILE, read_metadata, stored_tensors
    from moefoundry.checkpoint.manifest import Manifest
    from moefoundry.checkpoint.store import find_checkpoint

    with checkpoint_at(args.path) as path:
        directory = path if is_url(args.path) else find_checkpoint(str(path))
        manifest = Manifest.read(directory)
        manifest.check(METADATA_FILE, 0, manifest.size(METADATA_FILE))
        tensors = stored_tensors(read_metadata(directory))
    origin, name = manifest.origin, redact(args.path) if is_url(args.path) else directory
    print(f"{name}: batch {origin.batch}, saved at {origin.saved_at}, {_size(manifest.nbytes)}")
    print(f"mesh {_mesh(manifest)}, recipe {origin.recipe}")
    print(", ".join(f"{name} {version}" for name, version in origin.versions.items()))
    for name, value in origin.metrics.items():
        print(f"{name} {value:.6g}")
    for name, tensor in sorted(tensors.items()):
        print(f"  {name}  {str(tensor.spec.dtype).removeprefix('torch.')} {list(tensor.spec.shape)}")
    return 0


def _delete(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.manifest import is_committed
    from moefoundry.checkpoint.store import entries, in_use

    if is_url(args.path):
        raise UserError(f"{args.path}: checkpoints in a store are deleted with the store's own tools")
    path = Path(args.path)
    if args.step is not None:
        named = [directory for directory in _directories(path, args.path) if directory.name == f"ba{args.step}"]
        if not named:
            raise UserError(f"{args.path}: no checkpoint of step {args.step}")
        (directory,) = named
    else:
        directory = path.resolve()
        if not is_committed(directory) and directory not in entries(directory.parent):
            raise UserError(f"{args.path}: no checkpoint; name one, or --step of a run")
    if not args.yes:
        raise UserError(f"this deletes {directory}; say --yes")
    if in_use(directory):
        raise UserError(f"{directory} is in use by another process")
    shutil.rmtree(directory)
    print(f"deleted {directory}", file=sys.stderr)
    return 0


def _directories(path: Path, name: str) -> list[Path]:
    """The checkpoint that ``path`` is; or everything that is, was, or is about to become one of a run, oldest first.

    Raises:
        UserError: There is none; it is called ``name``.
    """
    from moefoundry.checkpoint.manifest import COMMIT_FILE, MANIFEST_FILE
    from moefoundry.checkpoint.store import entries

    if any((path / file).exists() for file in (COMMIT_FILE, MANIFEST_FILE)):
        return [path]
    found = [entry for root in (path / "checkpoints", path) for entry in entries(root)]
    if not found:
        raise UserError(f"{name}: no checkpoints there")
    return found


def _mesh(manifest: Manifest) -> str:
    axes = [f"{axis} {degree}" for axis, degree in manifest.origin.mesh.items()]
    return ", ".join(axes) or f"{manifest.origin.world_size} rank(s)"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
