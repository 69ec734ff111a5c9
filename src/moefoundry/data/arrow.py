"""Arrow files, and the directories of them that Hugging Face's ``datasets`` writes with ``save_to_disk``.

A directory of one data set has ``state.json``, which lists its files in order; other ``.arrow`` files beside them are
caches. A directory of several splits has ``dataset_dict.json``, and a directory for each. Neither that library is
needed nor is anything of the directory executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data.json_files import read_json
from moefoundry.data.reading import DamagedError
from moefoundry.data.records import Record

FILE_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"  # as neither text nor JSON begins


def is_arrow(file: Path) -> bool:
    """Tell an Arrow file or stream by its first bytes."""
    with open(file, "rb") as stream:
        return stream.read(len(FILE_MAGIC)).startswith((FILE_MAGIC, STREAM_MAGIC))


def arrow_records(file: Path, text_key: str | None) -> Iterator[Record]:
    """Yield the rows of an Arrow file or stream, with the one column that the text is in, or (None) with all.

    Without that column it yields the first row alone, with the size of the file.

    Raises:
        DamagedError: The file is no such file, or ends early.
    """
    import pyarrow  # tenths of a second

    try:
        with pyarrow.memory_map(str(file)) as source:
            yield from _rows(file, source, text_key)
    except pyarrow.ArrowException as error:
        raise DamagedError(str(error)) from error


def _rows(file: Path, source: Any, text_key: str | None) -> Iterator[Record]:
    import pyarrow

    by_number = source.read_at(len(FILE_MAGIC), 0) == FILE_MAGIC
    reader = pyarrow.ipc.open_file(source) if by_number else pyarrow.ipc.open_stream(source)
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches)) if by_number else iter(reader)
    column = text_key
    if text_key is not None and text_key not in reader.schema.names:
        column = text_key.split(".")[0]
    first = 1
    for batch in batches:
        if column is None:
            for row in batch.to_pylist():
                yield Record(first, len(str(row)), row)
                first += 1
        elif column not in reader.schema.names:
            if batch.num_rows:
                yield Record(1, file.stat().st_size, batch.slice(0, 1).to_pylist()[0])
                return
        else:
            for row in batch.column(column):
                try:
                    value = row.as_py()
                except UnicodeDecodeError:
                    value = row.as_buffer().to_pybytes()
                yield Record(first, len(str(value)), {column: value})
                first += 1


def of_data_set(place: Path, paths: Sequence[str]) -> list[str]:
    """Leave out the files that no ``state.json`` beside them lists.

    Args:
        place: The directory that was named.
        paths: Paths of Arrow files relative to it.

    Raises:
        UserError: ``place`` has several splits; or one of the small files is damaged.
    """
    if (place / "dataset_dict.json").is_file():
        splits = read_json(place / "dataset_dict.json").get("splits") or []
        if len(splits) != 1:
            raise UserError(f"{place}: has the splits {', '.join(map(str, splits))}; name one, such as {place}/train")
    kept = []
    for path in paths:
        state = (place / path).with_name("state.json")
        listed = read_json(state).get("_data_files") if state.is_file() else None
        if listed is None or Path(path).name in {entry.get("filename") for entry in listed}:
            kept.append(path)
    return kept
