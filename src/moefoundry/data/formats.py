"""Formats of documents: known by the name of a file, and where it says nothing, by the content."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

from moefoundry.config.errors import UserError
from moefoundry.data.reading import COMPRESSED_SUFFIXES, DAMAGES, encoding_of, read_head
from moefoundry.data.records import PARQUET_MAGIC


class CorpusFormat(StrEnum):
    """``text`` and ``source`` have a document a file, ``jsonl``, ``parquet`` and ``arrow`` one a record.

    ``stdlib`` is ``source`` with a fixed place and fixed exclusions.
    """

    text = "text"
    jsonl = "jsonl"
    source = "source"
    parquet = "parquet"
    arrow = "arrow"
    stdlib = "stdlib"


RECORD_FORMATS = frozenset({CorpusFormat.jsonl, CorpusFormat.parquet, CorpusFormat.arrow})
SUFFIXES = {
    CorpusFormat.text: (".txt", ".md"),
    CorpusFormat.jsonl: (".jsonl", ".ndjson"),
    CorpusFormat.source: (".py",),
    CorpusFormat.parquet: (".parquet",),
    CorpusFormat.arrow: (".arrow",),
}
FORMAT_OF_SUFFIX = {suffix: format for format, suffixes in SUFFIXES.items() for suffix in suffixes}
JSON_SUFFIX = ".json"
"""Suffix of documents only if asked for, or if there is nothing else: beside other files it often describes them."""


def suffix_of(name: str) -> str:
    """Return the lower-case suffix, without that of a compression: ``.txt`` for ``A.TXT.gz``."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def named_format(name: str) -> CorpusFormat | None:
    """Return the format that the name of a file declares."""
    suffix = suffix_of(name)
    return CorpusFormat.jsonl if suffix == JSON_SUFFIX else FORMAT_OF_SUFFIX.get(suffix)


def format_of_files(root: Path, paths: Sequence[str], default: CorpusFormat) -> CorpusFormat:
    """Find the one format of files that were chosen one by one or by a pattern.

    Args:
        root: Directory that their paths start from.
        paths: At least one.
        default: Format of a file whose name and content say nothing.

    Raises:
        UserError: They are of several formats.
    """
    named = {path: named_format(path) for path in paths}
    unnamed = [path for path, format in named.items() if format is None]
    found = {format if format in RECORD_FORMATS else default for format in named.values() if format}
    if unnamed:
        found.add(_format_of_content(root / unnamed[0], default))
    if len(paths) == 1 and named[paths[0]] not in (None, *RECORD_FORMATS):
        found = {named[paths[0]] or default}
    return one_format(root, found)


def one_format(place: Path, found: Iterable[CorpusFormat]) -> CorpusFormat:
    """Return the only format; where there are two, none is guessed.

    Raises:
        UserError: There are several.
    """
    formats = sorted(set(found), key=list(CorpusFormat).index)
    if len(formats) > 1:
        raise UserError(f"{place}: holds {' and '.join(formats)} files; say which are the corpus: format=...")
    return formats[0]


def _format_of_content(file: Path, default: CorpusFormat) -> CorpusFormat:
    try:
        head = read_head(file)
    except DAMAGES:
        return default  # reported when it is read
    if head.startswith(PARQUET_MAGIC):
        return CorpusFormat.parquet
    first = head.decode(encoding_of(head), "replace").lstrip().partition("\n")[0]
    try:
        return CorpusFormat.jsonl if isinstance(json.loads(first), dict) else default
    except (ValueError, RecursionError):
        return default
