"""Text of files: compression and encoding are known by content, whatever the name says.

gzip, Zstandard, bzip2 and xz are read as what they hold. UTF-8 is the rule; a byte-order mark, or the pattern of zero
bytes that ASCII has in UTF-16, tells UTF-16 and UTF-32. Text is kept as it is otherwise: no newline translation, no
Unicode normalization.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
HEAD_BYTES = 4096
COUNT_BYTES = 1 << 20


class DamagedError(Exception):
    """Content that its first bytes do not match."""


DAMAGES = (DamagedError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors that reading may raise; an ``OSError`` without an ``errno`` is about the content."""

MARK = "\udcff"  # stands for bytes that cannot be decoded; no text holds it
BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class BadBytes(Enum):
    """Treatment of bytes that are not text: drop their line, or replace them by U+FFFD."""

    drop = "drop"
    replace = "replace"


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return MARK, error.end


codecs.register_error("moefoundry.mark", _mark)


class NotTextError(ValueError):
    """Bytes that are no text in any encoding known here."""


def open_bytes(file: Path) -> BinaryIO:
    """Open the content of a file, decompressed.

    Raises:
        OSError: It cannot be opened. Reading may raise any of :data:`DAMAGES`.
    """
    with open(file, "rb") as raw:
        head = raw.read(10)
    if head.startswith(b"\x1f\x8b\x08"):
        return cast(BinaryIO, gzip.open(file))
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return cast(BinaryIO, bz2.open(file))
    if head.startswith(b"\xfd7zXZ\0"):
        return cast(BinaryIO, lzma.open(file))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # tenths of a second

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(open(file, "rb"), "r"), "zstd"))
    return open(file, "rb")


def is_plain(file: Path) -> bool:
    """Tell if a file is not compressed.

    Raises:
        OSError: It cannot be opened.
    """
    with open_bytes(file) as stream:
        return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)


def read_head(file: Path) -> bytes:
    """Read the first :data:`HEAD_BYTES` of the content, decompressed."""
    with open_bytes(file) as stream:
        return stream.read(HEAD_BYTES)


def encoding_of(head: bytes) -> str:
    """Guess the encoding of a text from its first bytes."""
    for mark, encoding in BOMS:
        if head.startswith(mark):
            return encoding
    pairs = len(head) // 2
    even, odd = head[: 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if pairs >= 2 and max(even, odd) > 0.4 * pairs and min(even, odd) < 0.05 * pairs:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def decode(data: bytes, bad_bytes: BadBytes, on_bad: Callable[[int, int], None]) -> str:
    """Decode a whole text.

    Args:
        data: Bytes of the text.
        bad_bytes: Treatment of bytes that cannot be decoded.
        on_bad: Called with the number (1-based) and the bytes of each line that is dropped.

    Raises:
        NotTextError: The bytes cannot be decoded and hold zeros.
    """
    encoding = encoding_of(data[:HEAD_BYTES])
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        if encoding.startswith("utf-8") and b"\0" in data[:HEAD_BYTES]:
            raise NotTextError from None
    if bad_bytes is BadBytes.replace:
        return data.decode(encoding, "replace")
    kept = []
    marked = data.decode(encoding, "moefoundry.mark")
    for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+", marked), start=1):
        if MARK in line:
            on_bad(number, len(line.encode(errors="surrogateescape")))
        else:
            kept.append(line)
    return "".join(kept)


def lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file in UTF-8, one in memory at a time (UTF-16 and UTF-32: all)."""
    encoding = encoding_of(read_head(file))
    with open_bytes(file) as stream:
        if encoding == "utf-8":
            yield from stream
        elif encoding == "utf-8-sig":
            stream.read(len(codecs.BOM_UTF8))
            yield from stream
        else:
            text = stream.read().decode(encoding, "moefoundry.mark")
            yield from (line.encode(errors="surrogateescape") for line in text.split("\n"))


def lines_between(file: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the lines of an uncompressed file in UTF-8 that begin at the bytes from ``start`` up to ``stop``."""
    with open(file, "rb") as stream:
        at = stream.seek(max(start - 1, 0))
        if start:
            at += len(stream.readline())  # the rest of the line before
        while at < stop and (line := stream.readline()):
            yield line
            at += len(line)


def count_lines(file: Path, start: int, stop: int) -> int:
    """Count the lines of an uncompressed file in UTF-8 that begin at the bytes from ``start`` up to ``stop``."""
    count = int(start == 0 < stop)
    with open(file, "rb") as stream:
        at = stream.seek(max(start - 1, 0))
        while at < stop - 1 and (data := stream.read(min(COUNT_BYTES, stop - 1 - at))):
            count += data.count(b"\n")
            at += len(data)
    return count
