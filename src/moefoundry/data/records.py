"""Records of JSON Lines, arrays of JSON, and Parquet.

The text of a record stands at a key, or at a path of keys with dots between them (``data.text``). A record without a
text costs itself alone, whatever is wrong with it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moefoundry.data.left_out import OF_RECORDS, Reason
from moefoundry.data.reading import (
    BadBytes,
    DamagedError,
    encoding_of,
    lines,
    lines_between,
    open_bytes,
    read_head,
)

PARQUET_MAGIC = b"PAR1"
BAD_JSON = (ValueError, RecursionError)
HINT_RECORDS = 100
JSON_SPACE = frozenset(", \t\r\n")


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        number: Number of its line, or of its place in an array or table, from 1.
        size: Size in bytes.
        value: Content, or the reason why it cannot be read.
    """

    number: int
    size: int
    value: Any


class Slice(NamedTuple):
    """Part of a file whose records are read; by default, the whole file.

    Attributes:
        path: Path relative to the corpus.
        start, stop: The records that begin between these places: bytes of JSON Lines, row groups of Parquet. None is
            the end.
        first: Number of the first record.
    """

    path: str
    start: int = 0
    stop: int | None = None
    first: int = 1


def json_records(file: Path, bad_bytes: BadBytes, part: Slice) -> Iterator[Record]:
    """Yield the records of a file of JSON: one a line, an array of them, or (``.json``) some that span lines.

    Args:
        file: The file.
        bad_bytes: Treatment of bytes that are not text.
        part: The part to read. Only files with :func:`one_a_line` and no compression can be divided.

    Raises:
        Exception: Any of :data:`moefoundry.data.reading.DAMAGES`.
    """
    one_value = ".json" in file.suffixes
    if part.stop is None and not one_a_line(file):
        encoding = encoding_of(read_head(file))
        with open_bytes(file) as stream:
            values = _values(_text(stream.read(), encoding, bad_bytes))
        first = next(values, None)
        if one_value or first is None or not isinstance(first.value, Reason):
            yield from itertools.chain([first] if first else [], values)
            return
    found = lines(file) if part.stop is None else lines_between(file, part.start, part.stop)
    for number, line in enumerate(found, start=part.first):
        if line.strip():
            yield Record(number, len(line), _parse(_text(line, "utf-8", bad_bytes)))


def one_a_line(file: Path) -> bool:
    """Tell if a file of JSON has one value a line, by its beginning."""
    head = read_head(file)
    return not _over_lines(head.decode(encoding_of(head), "replace").lstrip(), ".json" in file.suffixes)


def _over_lines(start: str, single: bool) -> bool:
    """Tell if a file that starts so is an array, or values over several lines, rather than one value a line."""
    first, newline, rest = start.partition("\n")
    value = _parse(first) if newline else Reason.not_json
    if first.startswith("["):
        return isinstance(value, Reason) or (not rest.strip() and all(isinstance(item, dict) for item in value))
    return single and bool(newline) and isinstance(value, Reason)


def _values(text: str) -> Iterator[Record]:
    """Yield the values of an array, or values that follow each other; the rest after a bad value is one bad record."""
    decoder = json.JSONDecoder()
    opening = re.match(r"\s*\[", text)
    at, end = _next_value(text, opening.end() if opening else 0), len(text.rstrip())
    if opening and text[:end].endswith("]"):
        end -= 1
    for number in itertools.count(1):
        if at >= end:
            return
        try:
            value, after = decoder.raw_decode(text, at)
        except BAD_JSON:
            yield Record(number, len(text) - at, Reason.not_json)
            return
        yield Record(number, after - at, value)
        at = _next_value(text, after)


def _next_value(text: str, at: int) -> int:
    while text[at : at + 1] in JSON_SPACE:
        at += 1
    return at


def is_parquet(file: Path) -> bool:
    """Tell a Parquet file by its first bytes."""
    with open(file, "rb") as stream:
        return stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def row_groups(file: Path) -> list[tuple[int, int]] | None:
    """List the rows and bytes of the row groups of a Parquet file; None of another file.

    Raises:
        DamagedError: It begins as such a file and cannot be read.
    """
    if not is_parquet(file):
        return None
    import pyarrow.parquet  # tenths of a second

    try:
        metadata = pyarrow.parquet.read_metadata(file)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise DamagedError(str(error)) from error
    return [(group.num_rows, group.total_byte_size) for group in groups]


def parquet_records(file: Path, text_key: str | None, part: Slice) -> Iterator[Record]:
    """Yield the rows of some row groups of a Parquet file, with the one column that the text is in, or (None) with all.

    Without that column it yields the first row alone, with the size of the file.

    Raises:
        Exception: Any of :data:`moefoundry.data.reading.DAMAGES`.
    """
    import pyarrow.parquet  # tenths of a second

    try:
        yield from _rows(file, text_key, part)
    except pyarrow.ArrowException as error:
        raise DamagedError(str(error)) from error


def _rows(file: Path, text_key: str | None, part: Slice) -> Iterator[Record]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
        if text_key is None:
            whole = (row for batch in table.iter_batches(1024, row_groups=groups) for row in batch.to_pylist())
            for number, row in enumerate(whole, start=part.first):
                yield Record(number, len(str(row)), row)
            return
        column = text_key if text_key in names else text_key.split(".")[0]
        if column not in names:
            first = next(table.iter_batches(1), None)
            if first is not None and part.start == 0:
                yield Record(1, file.stat().st_size, first.to_pylist()[0])
            return
        batches = table.iter_batches(1024, row_groups=groups, columns=[column])
        for number, row in enumerate((row for batch in batches for row in batch.column(0)), start=part.first):
            try:
                value = row.as_py()
            except UnicodeDecodeError:
                value = row.as_buffer().to_pybytes()
            yield Record(number, len(str(value)), {column: value})


def text_of(value: Any, text_key: str | None, bad_bytes: BadBytes) -> str | Reason:
    """Return the text of a record, or the reason why it has none; without a key the record itself, as JSON."""
    if isinstance(value, Reason):
        return value
    if not isinstance(value, dict):
        return Reason.not_json
    found: Any = json.dumps(value, ensure_ascii=False, default=str) if text_key is None else value
    for key in () if text_key is None else [text_key] if text_key in value else text_key.split("."):
        if not isinstance(found, dict) or key not in found:
            return Reason.no_key
        found = found[key]
    if found is None:
        return Reason.null
    if isinstance(found, bytes):  # a binary column
        found = found.decode(errors="replace" if bad_bytes is BadBytes.replace else "surrogateescape")
    if not isinstance(found, str):
        return Reason.not_string
    try:
        found.encode()
    except UnicodeEncodeError:  # JSON escapes can spell what UTF-8 cannot
        return Reason.bad_bytes if bad_bytes is BadBytes.drop else found.encode("utf-16", "replace").decode("utf-16")
    return found


def hint(records: Iterable[Record], file: Path, text_key: str) -> str:
    """Name the keys at which a record of ``file`` has text, where ``text_key`` has none; empty if there are none."""
    values = [record.value for record in itertools.islice(records, HINT_RECORDS) if isinstance(record.value, dict)]
    first = next((value for value in values if text_of(value, text_key, BadBytes.drop) in OF_RECORDS), {})
    strings = [path for path in _string_paths(first) if path != text_key]
    if strings:
        return f"{file.name} has strings at {', '.join(strings[:8])}: name the one that is text: text_key=..."
    lists = [key for key, value in first.items() if isinstance(value, list)]
    if lists:
        return f"{file.name} has lists at {', '.join(lists[:8])}, such as of messages: prepare those as instructions"
    return ""


def _string_paths(record: dict[str, Any], prefix: str = "", depth: int = 4) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, str):
            yield prefix + key
        elif isinstance(value, dict) and depth:
            yield from _string_paths(value, f"{prefix}{key}.", depth - 1)


def _text(data: bytes, encoding: str, bad_bytes: BadBytes) -> str:
    """Decode; bad bytes are replaced, or marked so that :func:`text_of` finds them in the text."""
    return data.decode(encoding, "replace" if bad_bytes is BadBytes.replace else "moefoundry.mark")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except BAD_JSON:
        return Reason.not_json
