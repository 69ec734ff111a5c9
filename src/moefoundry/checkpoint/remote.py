"""Checkpoints in object stores, beside those in ``run_dir``.

A remote checkpoint has the files of a local one, under ``{url}/ba{batch}/``. They are uploaded in the order in which
a save writes them: data, manifest, and the marker ``COMMITTED`` last. Readers look for markers, so that what an upload
has left unfinished is no checkpoint to anyone.

To resume, rank 0 downloads the small files into a local directory, beside a note of where they come from. It is then
a checkpoint like any other, except that :func:`local_file` downloads a data file when the one rank that reads it opens
it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moefoundry.checkpoint.manifest import COMMIT_FILE, DATA_SUFFIX, MANIFEST_FILE
from moefoundry.checkpoint.store import TOKENIZER
from moefoundry.data.stores import Remote

ORIGIN_FILE = "origin.json"
TRANSFERS = 4
_BATCH = re.compile(r"(?:.*/)?ba(\d+)/")


def upload_checkpoint(directory: Path, url: str) -> None:
    """Copy a committed checkpoint to ``{url}/{name of the directory}``; one process does it.

    Raises:
        UserError: The store fails for good. No reader sees the checkpoint then.
    """
    remote = Remote(f"{url.rstrip('/')}/{directory.name}")
    last = (MANIFEST_FILE, COMMIT_FILE)
    data = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(lambda name: remote.upload(directory / name, name), (n for n in data if n not in last)))
    for name in last:
        remote.upload(directory / name, name)


def find_remote(url: str, cache: Path) -> Path | None:
    """Fetch the checkpoint at a URL, or the newest below it, into a local directory that lacks the data files.

    Args:
        url: URL of a checkpoint, of the directory above it, or of a ``run_dir``.
        cache: Parent of the directory; it is emptied first.

    Returns:
        The directory; None where there is no complete checkpoint.

    Raises:
        UserError: The store fails for good.
    """
    remote = Remote(url)
    names = remote.names()
    found = [name.removesuffix(COMMIT_FILE) for name in names if name.rsplit("/", 1)[-1] == COMMIT_FILE]
    if not found:
        return None
    place = "" if "" in found else max(found, key=_batch)
    checkpoint = Remote(f"{remote.url}/{place}")
    shutil.rmtree(cache, ignore_errors=True)
    directory = cache / checkpoint.url.rsplit("/", 1)[-1]
    directory.mkdir(parents=True)
    for name in (name.removeprefix(place) for name in names if name.startswith(place)):
        inside, _, file = name.rpartition("/")
        if inside in ("", TOKENIZER) and not file.endswith(DATA_SUFFIX):
            (directory / inside).mkdir(exist_ok=True)
            checkpoint.download(name, directory / name)
    note_origin(directory, checkpoint.url)
    return directory


def note_origin(directory: Path, url: str) -> None:
    """Write the place of a directory's other files into it. Only this user may read it: it may have a password."""
    with open(os.open(directory / ORIGIN_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({"url": url}, file)


def _batch(place: str) -> int:
    match = _BATCH.fullmatch(place)
    return int(match[1]) if match else -1


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
