"""Checkpoints in object stores, beside those in ``run_dir``.

A remote checkpoint has the files of a local one, under ``{url}/ba{batch}/``. They are uploaded in the order in which
a save writes them: data, manifest, and the marker ``COMMITTED`` last. Before all of them the marker is replaced by one
that fits no manifest: not all stores let a writer delete, and that of an earlier upload of the batch would vouch for a
mixture. Readers look for markers that fit, so that what an upload has left unfinished is no checkpoint to anyone.

To resume, rank 0 downloads the small files into a local directory, beside a note of where they come from. It is then
a checkpoint like any other, except that :func:`local_file` downloads a data file when the one rank that reads it opens
it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moefoundry.checkpoint.manifest import COMMIT_FILE, DATA_SUFFIX, MANIFEST_FILE, Manifest
from moefoundry.checkpoint.store import CHECKPOINTS, TOKENIZER
from moefoundry.config import UserError
from moefoundry.config.secrets import redact
from moefoundry.data.stores import Remote

ORIGIN_FILE = "origin.json"
UNFINISHED = b"the upload of this checkpoint is under way, or did not end\n"
"""Stands in ``COMMITTED`` until all else is there."""

TRANSFERS = 4
_PLACE = re.compile(rf"({CHECKPOINTS}/)?ba(\d+)/")  # as find_checkpoint looks into a directory


def upload_checkpoint(directory: Path, url: str) -> None:
    """Copy a committed checkpoint to ``{url}/{name of the directory}``; one process does it.

    Raises:
        UserError: The store fails for good. No reader sees the checkpoint then.
    """
    remote = Remote(f"{url.rstrip('/')}/{directory.name}")
    remote.upload_bytes(UNFINISHED, COMMIT_FILE)
    last = (MANIFEST_FILE, COMMIT_FILE)
    data = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(lambda name: remote.upload(directory / name, name), (n for n in data if n not in last)))
    for name in last:
        remote.upload(directory / name, name)


def find_remote(url: str, cache: Path, after: int = -1) -> Path | None:
    """Fetch the checkpoint at a URL, or the newest below it, into a local directory that lacks the data files.

    One that is damaged, as far as its small files and the names of the others tell, is passed over with a warning.

    Args:
        url: URL of a checkpoint, of the directory above it, or of a ``run_dir``.
        cache: Parent of the directory; it is emptied first.
        after: Batch; of the checkpoints below the URL, only those of later ones are looked at.

    Returns:
        The directory; None where there is no complete checkpoint.

    Raises:
        UserError: The store fails for good, or there are complete checkpoints, but all are damaged.
    """
    remote = Remote(url)
    names = remote.names()
    damaged: list[str] = []
    shutil.rmtree(cache, ignore_errors=True)
    for place in _places(names, after):
        directory = _fetch_small(remote, names, place, cache)
        unfinished = (directory / COMMIT_FILE).read_bytes() == UNFINISHED
        problems = ["its upload is under way, or did not end"] if unfinished else _problems(directory, names, place)
        if not problems:
            return directory
        named = redact(f"{remote.url}/{place}".rstrip("/"))
        lines = [problem.replace(str(directory), named) for problem in problems]
        print("\n  ".join([f"warning: {named} is passed over:", *lines]), file=sys.stderr, flush=True)
        damaged += [] if unfinished else lines
        shutil.rmtree(directory)
    if damaged:
        remedy = "bring back the files of one of them, or move them away"
        raise UserError("\n  ".join([f"{url}: every checkpoint that could be taken is damaged:", *damaged, remedy]))
    return None


def _places(names: Sequence[str], after: int) -> list[str]:
    """List where among these objects there are markers of checkpoints, newest first; the empty place comes alone."""
    markers = [name.removesuffix(COMMIT_FILE) for name in names if name.rsplit("/", 1)[-1] == COMMIT_FILE]
    if "" in markers:
        return [""]
    found = [match for place in markers if (match := _PLACE.fullmatch(place)) and int(match[2]) > after]
    return [match[0] for match in sorted(found, key=lambda match: (match[1] or "", int(match[2])), reverse=True)]


def _fetch_small(remote: Remote, names: Sequence[str], place: str, cache: Path) -> Path:
    """Download all files of the checkpoint at a place but those of tensors."""
    checkpoint = Remote(f"{remote.url}/{place}")
    directory = cache / checkpoint.url.rsplit("/", 1)[-1]
    directory.mkdir(parents=True)
    for name in (name.removeprefix(place) for name in names if name.startswith(place)):
        inside, _, file = name.rpartition("/")
        if inside in ("", TOKENIZER) and not file.endswith(DATA_SUFFIX):
            (directory / inside).mkdir(exist_ok=True)
            checkpoint.download(name, directory / name)
    note_origin(directory, checkpoint.url)
    return directory


def _problems(directory: Path, names: Sequence[str], place: str) -> list[str]:
    """Say what is wrong with a checkpoint whose small files are here, without a look into the others."""
    try:
        manifest = Manifest.read(directory)
    except UserError as error:
        return [str(error)]
    absent = sorted(manifest.files.keys() - {name.removeprefix(place) for name in names})
    if absent:
        return [f"{directory / file}: not there" for file in absent]
    small = [file for file in manifest.files if not file.endswith(DATA_SUFFIX)]
    return [line for file in small for line in manifest.problems(file)]


def note_origin(directory: Path, url: str) -> None:
    """Write the place of a directory's other files into it. Only this user may read it: it may have a password."""
    with open(os.open(directory / ORIGIN_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({"url": url}, file)


def local_file(directory: Path, name: str) -> Path:
    """Give the path of a checkpoint's file, after a download if the checkpoint is remote and the file is not here yet.

    Raises:
        UserError: The store fails for good.
    """
    path = directory / name
    if not path.exists() and (url := origin_of(directory)) is not None:
        Remote(url).download(name, path)
    return path


def origin_of(directory: Path) -> str | None:
    """Read the URL that a checkpoint's directory was made from; None for a local checkpoint."""
    note = directory / ORIGIN_FILE
    return str(json.loads(note.read_text())["url"]) if note.exists() else None


def is_downloaded(directory: Path) -> bool:
    """Check whether this is the local directory of a remote checkpoint."""
    return (directory / ORIGIN_FILE).exists()
