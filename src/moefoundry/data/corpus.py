"""Documents of a corpus, in one form for every later stage.

A corpus is an ordered stream of :class:`Document`. The order is that of the relative paths (then of the records of a
file), so two machines that hold the same files see the same stream. Unusable text costs as little as possible (a line,
a record, a file), and is reported to the caller.

The special corpus ``stdlib`` is the source of the running interpreter's standard library: real code, on every machine,
no download. What it leaves out is in :data:`STDLIB_SKIPPED_DIRS` and :data:`STDLIB_SKIPPED_FILES`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moefoundry.config.errors import UserError
from moefoundry.data.arrow import arrow_records, is_arrow, of_data_set
from moefoundry.data.files import Entry, Report, check_patterns, matches, usable, walk
from moefoundry.data.formats import (
    JSON_SUFFIX,
    RECORD_FORMATS,
    SUFFIXES,
    CorpusFormat,
    format_of_files,
    named_format,
    one_format,
    suffix_of,
)
from moefoundry.data.left_out import OF_RECORDS, LeftOut, Reason
from moefoundry.data.reading import DAMAGES, BadBytes, NotTextError, decode, open_bytes
from moefoundry.data.records import Record, Slice, hint, is_parquet, json_records, parquet_records, text_of

STDLIB = "stdlib"

# A small model learns most from the library's own modules. Left out: test suites (more than half of the bytes, mostly
# long lists of assertions), generated tables (code pages, documentation topics, build settings with machine paths,
# character tables), third-party packages, and scripts that only draw with the turtle.
STDLIB_SKIPPED_DIRS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
STDLIB_SKIPPED_FILES = ("_sysconfigdata_", "entities.py", "stringprep.py")  # prefixes of file names


class Document(NamedTuple):
    """One text.

    Attributes:
        doc_id: Relative path, with ``:NUMBER`` of the line or record behind it for JSONL and Parquet. Unique.
        text: The text, not blank.
        split_key: Key that decides the split: the relative path, or the text for JSONL and Parquet.
    """

    doc_id: str
    text: str
    split_key: str


@dataclass(frozen=True)
class Corpus:
    """An opened corpus; build it with :func:`open_corpus`.

    Attributes:
        root: Directory that relative paths start from.
        format: Format of the documents.
        paths: Relative POSIX paths, sorted.
        text_key: JSONL and Parquet only: the key that holds the text; None takes the record itself, as JSON.
        bad_bytes: Treatment of bytes that are not text.
        unusable: Name, reason and bytes of entries that are not readable files.
        ignored: Number of files of each other suffix.
    """

    root: Path
    format: CorpusFormat
    paths: tuple[str, ...]
    text_key: str | None = "text"
    bad_bytes: BadBytes = BadBytes.drop
    unusable: tuple[tuple[str, Reason, int | None], ...] = ()
    ignored: tuple[tuple[str, int], ...] = ()

    def documents(
        self, report: Report = lambda name, reason, size: None, parts: Iterable[Slice] | None = None
    ) -> Iterator[Document]:
        """Stream the documents in order, one file (one line for JSONL) in memory at a time.

        Args:
            report: Called with each part that is left out.
            parts: Parts of files to read; the whole corpus if None.
        """
        read = self._records if self.format in RECORD_FORMATS else self._whole
        for part in map(Slice, self.paths) if parts is None else parts:
            try:
                yield from read(part, report)
            except DAMAGES as error:
                unreadable = isinstance(error, OSError) and error.errno is not None
                size = _size(self.root / part.path)
                report(part.path, Reason.unreadable if unreadable else Reason.damaged, size)

    def _whole(self, part: Slice, report: Report) -> Iterator[Document]:
        path = part.path
        with open_bytes(self.root / path) as stream:
            data = stream.read()
        try:
            text = decode(data, self.bad_bytes, lambda line, size: report(f"{path}:{line}", Reason.bad_bytes, size))
        except NotTextError:
            report(path, Reason.not_text, len(data))
            return
        if text and not text.isspace():
            yield Document(path, text, path)
        else:
            report(path, Reason.blank, len(data))

    def _records(self, part: Slice, report: Report) -> Iterator[Document]:
        for record in self._records_of(part):
            text = text_of(record.value, self.text_key, self.bad_bytes)
            name = f"{part.path}:{record.number}"
            if isinstance(text, Reason):
                report(name, text, record.size)
            elif text and not text.isspace():
                yield Document(name, text, text)
            else:
                report(name, Reason.blank, record.size)

    def _records_of(self, part: Slice) -> Iterator[Record]:
        file = self.root / part.path
        if is_parquet(file):
            return parquet_records(file, self.text_key, part)
        if is_arrow(file):
            return arrow_records(file, self.text_key)
        return json_records(file, self.bad_bytes, part)

    def hint(self, left_out: LeftOut) -> str:
        """Advise how to read the records that have no text; empty if there are none, or no advice."""
        names = [left["first"][0] for reason, left in left_out.reasons.items() if reason in OF_RECORDS]
        if not names or self.text_key is None:
            return ""
        path = names[0].rpartition(":")[0]
        return hint(self._records_of(Slice(path)), self.root / path, self.text_key)


def add_to_digest(digest: hashlib._Hash, document: Document, data: bytes) -> None:
    """Add a document, whose text in UTF-8 is ``data``, to a corpus' digest."""
    digest.update(f"{document.doc_id}\0{len(data)}\0".encode(errors="surrogateescape"))
    digest.update(data)


def open_corpus(
    source: str,
    format: CorpusFormat | None = None,
    globs: tuple[str, ...] = (),
    text_key: str | None = "text",
    bad_bytes: BadBytes = BadBytes.drop,
    leave: Path | None = None,
) -> Corpus:
    """Find the files of a corpus.

    Args:
        source: A file, a directory, or ``stdlib`` (``./stdlib`` is the directory of that name).
        format: Format of the documents; inferred if None.
        globs: Patterns relative to ``source``; without a format, files that are no records are a source tree.
        text_key: As in :class:`Corpus`.
        bad_bytes: Treatment of bytes that are not text.
        leave: A directory inside ``source`` that is no part of it.

    Raises:
        UserError: ``source`` does not exist, holds no matching file, or its format cannot be inferred.
    """
    if source == STDLIB or format is CorpusFormat.stdlib:
        if source != STDLIB or format not in (None, CorpusFormat.stdlib) or globs:
            raise UserError(f"{source}: the corpus 'stdlib' takes neither a place, nor format=..., nor globs=...")
        root = Path(sysconfig.get_path("stdlib"))
        return Corpus(root, CorpusFormat.stdlib, tuple(_stdlib_paths(root)), text_key, bad_bytes)

    if scheme := url_scheme(source):
        raise UserError(f"{scheme}://...: not a local path; copy the corpus to this machine first")
    place = Path(source)
    if os.path.isfile(place):
        format = format or format_of_files(place.parent, [place.name], CorpusFormat.text)
        return Corpus(place.parent, format, (place.name,), text_key, bad_bytes)
    try:
        status = place.stat()
    except OSError as error:
        raise UserError(f"{source}: {str(error.strerror).lower()} (the corpus to prepare)") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{source}: neither a file nor a directory; the text is read more than once, so make it a file")
    return _open_directory(place, format, globs, text_key, bad_bytes, leave)


def _open_directory(
    place: Path,
    format: CorpusFormat | None,
    globs: tuple[str, ...],
    text_key: str | None,
    bad_bytes: BadBytes,
    leave: Path | None,
) -> Corpus:
    unusable: list[tuple[str, Reason, int | None]] = []

    def report(name: str, reason: Reason, size: int | None) -> None:
        unusable.append((name, reason, size))

    check_patterns(globs, place)
    entries = walk(place, leave, report, globs or ("**",))
    if globs:
        chosen = [entry for entry in entries if any(matches(entry.path, pattern) for pattern in globs)]
        wanted = "no file matches " + " ".join(globs)
    else:
        format = format or _only_format(place, entries, unusable)
        chosen = _of_format(entries, format)
        wanted = f"no file of {format} ({' '.join(SUFFIXES[format])}); other files need globs=..."
    paths = tuple(usable(chosen, place, report))
    if format is CorpusFormat.arrow:
        paths = tuple(of_data_set(place, paths))
    if not paths and not unusable:
        raise UserError(f"{place}: empty corpus: {wanted}")
    format = format or (format_of_files(place, paths, CorpusFormat.source) if paths else CorpusFormat.source)
    others = Counter(suffix_of(entry.path) for entry in set(entries) - set(chosen))
    ignored = () if globs else tuple(others.most_common())
    return Corpus(place, format, paths, text_key, bad_bytes, tuple(sorted(unusable)), ignored)


def url_scheme(place: str) -> str:
    """Return ``s3`` of ``s3://bucket/name`` (also where a path has made one slash of the two); empty for a path."""
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", place)
    return match[1] if match and not os.path.exists(place) else ""


def _only_format(place: Path, entries: list[Entry], unusable: list[tuple[str, Reason, int | None]]) -> CorpusFormat:
    """Find the one format of the files in ``place``."""
    suffixes = {suffix_of(entry.path) for entry in entries}
    found = [format for format, own in SUFFIXES.items() if suffixes & set(own)]
    if not found and JSON_SUFFIX in suffixes:
        return CorpusFormat.jsonl
    if not found:
        known = " ".join([*(suffix for own in SUFFIXES.values() for suffix in own), JSON_SUFFIX])
        unread = "".join(f"; {reason}: {name}" for name, reason, _ in unusable[:1])
        raise UserError(f"{place}: empty corpus: no file of a known kind ({known}); other files need globs=...{unread}")
    return one_format(place, found)


def _of_format(entries: list[Entry], format: CorpusFormat) -> list[Entry]:
    """Choose the entries whose name declares the format, and broken links that may have led to a directory of them."""
    chosen = [entry for entry in entries if suffix_of(entry.path) in SUFFIXES[format]]
    chosen = chosen or [entry for entry in entries if named_format(entry.path) is format]
    return chosen + [entry for entry in entries if entry.status is None and not suffix_of(entry.path)]


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _stdlib_paths(root: Path) -> list[str]:
    """List the paths of the standard library's source; site-packages are not entered."""
    paths: list[str] = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in STDLIB_SKIPPED_DIRS]
        relative = Path(directory).relative_to(root)
        paths.extend(
            (relative / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(STDLIB_SKIPPED_FILES)
        )
    if not paths:
        raise UserError(f"{root}: this Python installation carries no source of its standard library")
    return sorted(paths)
