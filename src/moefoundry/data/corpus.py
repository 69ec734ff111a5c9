"""Documents: what every later stage reads, whatever the text was stored in.

A corpus is an ordered stream of :class:`Document`. The order is that of the relative paths (then of the lines of a
JSONL file), so two machines that hold the same files see the same stream. Text is kept byte for byte: no newline
translation, no Unicode normalization. Files that are not UTF-8 and documents without a visible character are left out,
and reported to the caller.

The held-out split is by *file* (by document for JSONL): a file is in exactly one split, decided by a hash of the seed
and its relative path alone. It does not change when other files come or go. A JSONL document is hashed by its text, so
that exact duplicates never lie on both sides.

The special corpus ``stdlib`` is the source of the running interpreter's standard library: real code, on every machine,
no download. What it leaves out is in :data:`STDLIB_SKIPPED_DIRS` and :data:`STDLIB_SKIPPED_FILES`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moefoundry.config.errors import UserError

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


class CorpusFormat(StrEnum):
    """How documents are stored. ``stdlib`` is ``source`` with a fixed place and fixed exclusions."""

    text = "text"
    jsonl = "jsonl"
    source = "source"
    stdlib = "stdlib"


class Split(StrEnum):
    train = "train"
    val = "val"


FORMAT_GLOBS = {
    CorpusFormat.text: ("**/*.txt", "**/*.md"),
    CorpusFormat.jsonl: ("**/*.jsonl",),
    CorpusFormat.source: ("**/*.py",),
}


class Document(NamedTuple):
    """One text.

    Attributes:
        doc_id: Relative path, with ``:LINE`` behind it for JSONL. Unique in the corpus.
        text: The text, not blank.
        split_key: What decides the split: the relative path, or the text for JSONL.
    """

    doc_id: str
    text: str
    split_key: str


@dataclass(frozen=True)
class CorpusScan:
    """What one pass over a corpus found.

    Attributes:
        documents: Documents within the caps; the first so many of the stream.
        bytes: Their UTF-8 size.
        skipped: Files or lines left out as blank or not UTF-8.
        sha256: Digest of every admitted document's id and text, in order.
    """

    documents: int
    bytes: int
    skipped: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """An opened corpus; build it with :func:`open_corpus`.

    Attributes:
        root: Directory that relative paths start from.
        format: How the documents are stored.
        paths: Relative POSIX paths, sorted.
        text_key: JSONL only: the key that holds the text.
    """

    root: Path
    format: CorpusFormat
    paths: tuple[str, ...]
    text_key: str

    def documents(self, on_skip: Callable[[str], None] | None = None) -> Iterator[Document]:
        """Stream the documents in order, one file (one line for JSONL) in memory at a time.

        Args:
            on_skip: Called with the id of everything that is left out (blank, or not UTF-8).

        Raises:
            UserError: A JSONL line is not an object with a string at ``text_key``, or a file cannot be read.
        """
        for path in self.paths:
            if self.format is CorpusFormat.jsonl:
                candidates = self._jsonl_documents(path)
            else:
                with _open(self.root / path) as file:
                    candidates = iter([Document(path, _decode(file.read()), path)])
            for document in candidates:
                if document.text and not document.text.isspace():
                    yield document
                elif on_skip is not None:
                    on_skip(document.doc_id)

    def _jsonl_documents(self, path: str) -> Iterator[Document]:
        file = self.root / path
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}:{number}: not a JSON object: {error}") from error
                text = record.get(self.text_key) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise UserError(
                        f"{file}:{number}: no string at the key {self.text_key!r}; name the right one with --text-key"
                    )
                yield Document(f"{path}:{number}", text if _is_unicode(text) else "", text)

    def scan(self, max_docs: int | None = None, max_bytes: int | None = None) -> CorpusScan:
        """Read the corpus once, for its size and its digest.

        Args:
            max_docs: Stop after this many documents.
            max_bytes: Stop before the document that would exceed this many bytes of UTF-8.
        """
        digest = hashlib.sha256()
        documents = total_bytes = 0
        skipped: list[str] = []
        for document in islice(self.documents(on_skip=skipped.append), max_docs):
            data = document.text.encode()
            if max_bytes is not None and total_bytes + len(data) > max_bytes:
                break
            documents += 1
            total_bytes += len(data)
            digest.update(f"{document.doc_id}\0{len(data)}\0".encode())
            digest.update(data)
        return CorpusScan(documents, total_bytes, len(skipped), digest.hexdigest())


def open_corpus(
    source: str, format: CorpusFormat | None = None, globs: tuple[str, ...] = (), text_key: str = "text"
) -> Corpus:
    """Find the files of a corpus.

    Args:
        source: A file, a directory, or ``stdlib`` (``./stdlib`` is the directory of that name).
        format: How documents are stored; inferred if None.
        globs: Patterns relative to ``source``; given without a format they make it a source tree.
        text_key: JSONL only: the key that holds the text.

    Raises:
        UserError: ``source`` does not exist, holds no matching file, or its format cannot be inferred.
    """
    if source == STDLIB or format is CorpusFormat.stdlib:
        if source != STDLIB or format not in (None, CorpusFormat.stdlib) or globs:
            raise UserError(f"{source}: the corpus 'stdlib' takes neither a place, nor --format, nor --glob")
        root = Path(sysconfig.get_path("stdlib"))
        return Corpus(root, CorpusFormat.stdlib, tuple(_stdlib_paths(root)), text_key)

    place = Path(source)
    if not place.exists():
        raise UserError(f"{source}: no such file or directory (the corpus to prepare)")
    if format is None:
        format = CorpusFormat.source if globs else _infer_format(place)
    if place.is_file():
        return Corpus(place.parent, format, (place.name,), text_key)
    patterns = globs or FORMAT_GLOBS[format]
    paths = tuple(_matching_paths(place, patterns))
    if not paths:
        raise UserError(f"{source}: empty corpus: no file matches {' '.join(patterns)}")
    return Corpus(place, format, paths, text_key)


def split_of(document: Document, val_fraction: float, seed: int) -> Split:
    """The split a document belongs to; ``val_fraction`` is the expected share of files (documents for JSONL)."""
    return Split.val if unit_hash(document.split_key, seed) < val_fraction else Split.train


def unit_hash(key: str, seed: int) -> float:
    """A number in [0, 1), uniform over keys, that is the same on every machine and in every release."""
    data = f"{seed}\0{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


def _infer_format(place: Path) -> CorpusFormat:
    """The one format whose files ``place`` holds; a directory that holds two kinds is never guessed."""
    if place.is_file():
        suffixes = {".jsonl": CorpusFormat.jsonl, ".py": CorpusFormat.source}
        return suffixes.get(place.suffix, CorpusFormat.text)
    found = [format for format, globs in FORMAT_GLOBS.items() if any(_matching_paths(place, globs))]
    if len(found) == 1:
        return found[0]
    known = " ".join(glob for globs in FORMAT_GLOBS.values() for glob in globs)
    if not found:
        raise UserError(f"{place}: empty corpus: no file matches {known}; other files need --glob")
    kinds = " and ".join(found)
    raise UserError(f"{place}: holds {kinds} files; say which are the corpus with --format")


def _matching_paths(root: Path, patterns: tuple[str, ...]) -> list[str]:
    """Sorted relative POSIX paths of the files that match, hidden files and directories left out."""
    paths: set[str] = set()
    for pattern in patterns:
        try:
            matches = [file.relative_to(root) for file in root.glob(pattern) if file.is_file()]
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"--glob {pattern!r}: not a pattern relative to {root}: {error}") from error
        paths.update(match.as_posix() for match in matches if not any(part.startswith(".") for part in match.parts))
    return sorted(paths)


def _stdlib_paths(root: Path) -> list[str]:
    """Like :func:`_matching_paths`; walks by hand so as not to descend into site-packages."""
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


def _open(file: Path) -> BinaryIO:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _decode(data: bytes) -> str:
    """The text, or an empty string (which is left out as blank) if the bytes are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON escapes can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
