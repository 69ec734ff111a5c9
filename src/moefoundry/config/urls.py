"""Paths of this machine and URLs: one rule for data, checkpoints, uploads and every command.

A place with ``://`` is a URL. ``file:///a/b`` is the path ``/a/b`` wherever a URL may stand (``%20`` is a blank there,
as in every URL); ``~`` at the beginning of a path is the home directory. ``s3://``, ``gs://``, ``oci://`` and
``azure://`` have clients of their own, with the environment variables of these; all other URLs are fsspec's.
"""

from __future__ import annotations

import difflib
import os
import re
from urllib.parse import unquote

OBJECT_STORES = ("s3", "gs", "oci", "azure")
DATA_ALONE = ("azure-dl", "alipan", "dbfs-uc")
"""Schemes that only mosaicml-streaming knows."""
LONGEST_NAME = 255  # bytes of one name, and below:
LONGEST_PATH = 3_500  # of a path, under which a run writes others; the usual file systems end at 4,096

_COLLAPSED = re.compile(r"([a-z][a-z0-9+.\-]+):/(?!/)")  # one letter would be a drive


def is_url(place: str) -> bool:
    """Tell whether a place is named by a URL."""
    return "://" in place


def expanded(path: str) -> str:
    """Put the home directory for ``~`` and ``~user``. URLs, and names of users that there are not, stay."""
    return os.path.expanduser(path)


def resolved(place: str) -> str:
    """Turn a ``file://`` URL into the path that it names and expand a path's ``~``; leave other URLs as they are.

    Raises:
        ValueError: A ``file://`` URL names a host.
    """
    if not is_url(place):
        return expanded(place)
    scheme, _, rest = place.partition("://")
    if scheme != "file":
        return place
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"a file:// URL has three slashes and a whole path: file:///{rest}")
    return unquote(f"/{path}")


def naming_problem(path: str) -> str:
    """Say why no file can have this (expanded) path; return "" where one can. Nothing is looked for on disk."""
    if not path:
        return "is empty"
    if "\0" in path:
        return "holds a NUL character"
    if path.startswith("~"):
        return f"{path.partition('/')[0]} is no user of this machine"
    if is_url(path):
        return ""
    if len(path.encode()) > LONGEST_PATH:
        return f"is longer than {LONGEST_PATH} bytes"
    if any(len(name.encode()) > LONGEST_NAME for name in path.split("/")):
        return f"has a name of more than {LONGEST_NAME} bytes in it"
    return ""


def url_problem(place: str, for_data: bool = False) -> str:
    """Say why nothing can be at ``place``, a path or a URL; return "" if something can.

    Args:
        place: Path or URL as the user wrote it.
        for_data: Whether mosaicml-streaming reads it, which knows a few stores more.
    """
    if not place.strip():
        return "is empty"
    if not is_url(place):
        match = _COLLAPSED.match(place)
        return f"a URL has two slashes: {match[1]}://{place[match.end() :]}" if match else ""
    scheme, _, rest = place.partition("://")
    known = {*OBJECT_STORES, *_fsspec_schemes(), *(DATA_ALONE if for_data else ())}
    if scheme not in known:
        alike = sorted(name for name in known if name[0] == scheme[:1])  # or half of the letters are chance
        near = "".join(difflib.get_close_matches(scheme, alike, 1, 0.5))
        return f"no store has URLs that begin with {scheme}://" + (f"; did you mean {near}://?" if near else "")
    if re.search(r"\s", rest) and scheme in OBJECT_STORES:
        return "a URL has no blanks"
    try:
        return "" if resolved(place) != place or rest.strip("/") else f"names no bucket or host after {scheme}://"
    except ValueError as error:
        return str(error)


def path_problem(place: str) -> str:
    """Say why ``place`` is not a path of this machine; return "" if it is one."""
    if not is_url(place):
        return url_problem(place)
    try:
        path = resolved(place)
    except ValueError as error:
        return str(error)
    return f"a path is written without file://: {path}" if path != place else "must be a path, not a URL"


def _fsspec_schemes() -> list[str]:
    import fsspec  # type: ignore[import-untyped]

    return fsspec.available_protocols()
