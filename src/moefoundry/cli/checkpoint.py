"""``moefoundry checkpoint``: look at the checkpoints of a run, verify and delete them. Heavy imports happen inside."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefoundry.config.errors import UserError

if TYPE_CHECKING:
    from moefoundry.checkpoint.manifest import Manifest

EXIT_DAMAGED = 1
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE  # what a shell reports of any other program


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
    if not args.path.is_dir():
        raise UserError(f"{args.path}: no such directory")
    actions = {"list": _list, "verify": _verify, "show": _show, "delete": _delete}
    try:
        status = actions[args.action](args)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `show RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is flushed at exit
        return EXIT_PIPE_CLOSED
    return status


def _action(actions: Any, name: str, text: str, path: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="RUN_OR_DIR", help=path)
    return parser


def _list(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.manifest import Manifest

    directories = _directories(args.path)
    print(f"{'checkpoint':24} {'saved at':26} {'size':>10}  {'mesh':36} state")
    for directory in directories:
        try:
            manifest = Manifest.read(directory)
        except UserError:
            size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            cells, state = ("", _size(size), ""), "not committed"
        else:
            cells, state = (manifest.origin.saved_at, _size(manifest.nbytes), _mesh(manifest)), "committed"
        state = "quarantined" if ".quarantine-" in directory.name else state
        print(f"{directory.resolve().name:24} {cells[0]:26} {cells[1]:>10}  {cells[2]:36} {state}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.manifest import COMMIT_FILE, MANIFEST_FILE, damage
    from moefoundry.checkpoint.store import STAGING_SUFFIX

    single = any((args.path / name).exists() for name in (COMMIT_FILE, MANIFEST_FILE))
    directories = [args.path] if single else _directories(args.path)
    damaged = False
    for directory in directories:
        if directory.name.endswith(STAGING_SUFFIX):
            continue
        problems = damage(directory)
        damaged |= bool(problems)
        print(*problems or [f"{directory}: intact"], sep="\n")
    return EXIT_DAMAGED if damaged else 0


def _show(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.format import METADATA_FILE, read_metadata, tensor_entries
    from moefoundry.checkpoint.manifest import Manifest
    from moefoundry.checkpoint.store import find_checkpoint

    directory = find_checkpoint(str(args.path))
    manifest = Manifest.read(directory)
    manifest.check(METADATA_FILE, 0, manifest.size(METADATA_FILE))
    origin = manifest.origin
    print(f"{directory}: batch {origin.batch}, saved at {origin.saved_at}, {_size(manifest.nbytes)}")
    print(f"mesh {_mesh(manifest)}, recipe {origin.recipe}")
    print(", ".join(f"{name} {version}" for name, version in origin.versions.items()))
    for name, value in origin.metrics.items():
        print(f"{name} {value:.6g}")
    for name, entry in sorted(tensor_entries(read_metadata(directory)).items()):
        print(f"  {name}  {str(entry.properties.dtype).removeprefix('torch.')} {list(entry.size)}")
    return 0


def _delete(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.manifest import is_committed
    from moefoundry.checkpoint.store import entries, in_use

    if args.step is not None:
        named = [directory for directory in _directories(args.path) if directory.name == f"ba{args.step}"]
        if not named:
            raise UserError(f"{args.path}: no checkpoint of step {args.step}")
        (directory,) = named
    else:
        directory = args.path.resolve()
        if not is_committed(directory) and directory not in entries(directory.parent):
            raise UserError(f"{args.path}: no checkpoint; name one, or --step of a run")
    if not args.yes:
        raise UserError(f"this deletes {directory}; say --yes")
    if in_use(directory):
        raise UserError(f"{directory} is in use by another process")
    shutil.rmtree(directory)
    print(f"deleted {directory}", file=sys.stderr)
    return 0


def _directories(path: Path) -> list[Path]:
    """Everything that is, was, or is about to become a checkpoint of a run, oldest first; of a checkpoint, itself."""
    from moefoundry.checkpoint.manifest import is_committed
    from moefoundry.checkpoint.store import entries

    if is_committed(path):  # such as an import, which is in no run
        return [path]
    found = [entry for root in (path / "checkpoints", path) for entry in entries(root)]
    if not found:
        raise UserError(f"{path}: no checkpoints there")
    return found


def _mesh(manifest: Manifest) -> str:
    axes = [f"{axis} {degree}" for axis, degree in manifest.origin.mesh.items()]
    return ", ".join(axes) or f"{manifest.origin.world_size} rank(s)"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
