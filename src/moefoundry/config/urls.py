"""Places: a path of this machine, or a URL. One rule for data, checkpoints, uploads and every command.

What has ``://`` is a URL. ``file:///a/b`` is the path ``/a/b`` (``%20`` is a blank there, as in every URL), wherever a
URL may stand; ``~`` at the beginning of a path is the home directory. ``s3://``, ``gs://``, ``oci://`` and
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

_COLLAPSED = re.compile(r"([a-z][a-z0-9+.\-]+):/(?!/)")  # one letter would be a drive


def is_url(place: str) -> bool:
    """True for a place that is named by a URL."""
    return "://" in place


def resolved(place: str) -> str:
    """A ``file://`` URL as the path that it names, a path with its ``~`` expanded; other URLs as they are.

    Raises:
        ValueError: A ``file://`` URL names a host.
    """
    if not is_url(place):
        return os.path.expanduser(place)
    scheme, _, rest = place.partition("://")
    if scheme != "file":
        return place
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"a file:// URL has three slashes and a whole path: file:///{rest}")
    return unquote(f"/{path}")


def url_problem(place: str, for_data: bool = False) -> str:
    """Why nothing can be at ``place``, a path or a URL; an empty string if something can.

    Args:
        place: As the user wrote it.
        for_data: Whether it is to be read by mosaicml-streaming, which knows a few stores more.
    """
    if not place.strip():
        return "is empty"
    if not is_url(place):
        match = _COLLAPSED.match(place)
        return f"a URL has two slashes: {match[1]}://{place[match.end() :]}" if match else ""
    scheme, _, rest = place.partition("://")
    known = _schemes() | (set(DATA_ALONE) if for_data else set())
    if scheme not in known:
        near = "".join(difflib.get_close_matches(scheme, sorted(known), 1, 0.5))
        return f"no store has URLs that begin with {scheme}://" + (f"; did you mean {near}://?" if near else "")
    if re.search(r"\s", rest) and scheme in OBJECT_STORES:
        return "a URL has no blanks"
    try:
        return "" if resolved(place) != place or rest.strip("/") else f"names no bucket or host after {scheme}://"
    except ValueError as error:
        return str(error)


def path_problem(place: str) -> str:
    """Why ``place`` is not a path of this machine; an empty string if it is one."""
    if is_url(place):
        try:
            path = resolved(place)
        except ValueError as error:
            return str(error)
        return f"a path is written without file://: {path}" if path != place else "must be a path, not a URL"
    return url_problem(place)


def _schemes() -> set[str]:
    import fsspec  # type: ignore[import-untyped]

    return {*OBJECT_STORES, *fsspec.available_protocols()}
