"""Blocks of a corpus: the parts that are prepared independently of each other, each into shards of its own.

The cuts follow from the list of files and their sizes alone, so any number of processes, on any machine, sees the same
blocks without reading the text before its own. Small files share a block. A large file of JSON Lines is cut by its
bytes, and one of Parquet by its row groups; other files stay whole, compressed ones among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moefoundry.data.arrow import is_arrow
from moefoundry.data.corpus import Corpus
from moefoundry.data.formats import RECORD_FORMATS
from moefoundry.data.reading import DAMAGES, count_lines, encoding_of, is_plain, read_head
from moefoundry.data.records import Slice, is_parquet, one_a_line, row_groups


@dataclass(frozen=True)
class Block:
    """Consecutive parts of files.

    Attributes:
        number: Place in the corpus, from 0.
        slices: Parts of files, in order.
    """

    number: int
    slices: tuple[Slice, ...]


WANTED_BLOCKS = 64  # a number that many processes share evenly
SMALLEST_PART = 32


def block_size(corpus: Corpus, most: int) -> int:
    """Choose the bytes of a block: those of a small corpus are smaller, down to a thirty-second of ``most``."""
    total = sum(size_of(corpus.root / path) for path in corpus.paths)
    return min(most, max(most // SMALLEST_PART, total // WANTED_BLOCKS))


def size_of(file: Path) -> int:
    """Return the size of a file; 0 if it cannot be had, which is reported when the file is read."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def plan_blocks(corpus: Corpus, block_bytes: int) -> list[Block]:
    """Cut a corpus into blocks of at least ``block_bytes`` of its files, but for the last one."""
    blocks: list[Block] = []
    pending: list[Slice] = []
    size = 0
    for path in corpus.paths:
        for part, nbytes in _pieces(corpus, path, block_bytes):
            pending.append(part)
            size += nbytes
            if size >= block_bytes:
                blocks.append(Block(len(blocks), tuple(pending)))
                pending, size = [], 0
    return [*blocks, Block(len(blocks), tuple(pending))] if pending else blocks


def _pieces(corpus: Corpus, path: str, block_bytes: int) -> Iterator[tuple[Slice, int]]:
    """Yield the parts of a file with their bytes."""
    file = corpus.root / path
    size = size_of(file)
    try:
        dividable = corpus.format in RECORD_FORMATS and size > block_bytes and is_plain(file)
        rows = row_groups(file) if dividable else None
        by_lines = dividable and rows is None and not is_arrow(file)
        by_lines = by_lines and encoding_of(read_head(file)) == "utf-8" and one_a_line(file)
    except DAMAGES:  # reported when it is read
        yield Slice(path), 0
        return
    if rows is not None:
        yield from _row_pieces(path, rows, block_bytes)
    elif by_lines:
        for start in range(0, size, block_bytes):
            yield Slice(path, start, min(start + block_bytes, size)), min(block_bytes, size - start)
    else:
        yield Slice(path), size


def _row_pieces(path: str, groups: list[tuple[int, int]], block_bytes: int) -> Iterator[tuple[Slice, int]]:
    """Cut a Parquet file between row groups, of which ``groups`` has the rows and the bytes."""
    start, size, rows, first = 0, 0, 0, 1
    for number, (own_rows, nbytes) in enumerate(groups, start=1):
        size += nbytes
        rows += own_rows
        if size >= block_bytes or number == len(groups):
            yield Slice(path, start, number, first), size
            start, size, rows, first = number, 0, 0, first + rows


def numbered(corpus: Corpus, blocks: list[Block]) -> list[Block]:
    """Count the lines of divided files, so that each part begins with the number of its line in the file."""
    before: dict[str, int] = {}
    result = []
    for block in blocks:
        slices = []
        for part in block.slices:
            if part.stop is not None and part.first == 1 and not is_parquet(corpus.root / part.path):
                lines = before.setdefault(part.path, 0)
                slices.append(part._replace(first=lines + 1))
                before[part.path] = lines + count_lines(corpus.root / part.path, part.start, part.stop)
            else:
                slices.append(part)
        result.append(replace(block, slices=tuple(slices)))
    return result


def name_in_file(root: Path, block: Block, name: str) -> str:
    """Turn the name of a record, whose number counts from the start of a block's part, into that in its file."""
    for part in block.slices:
        found = re.match(rf"{re.escape(part.path)}:(\d+)", name)
        if found and part.start and part.first == 1:  # those of Parquet know their first row
            number = count_lines(root / part.path, 0, part.start) + int(found[1])
            return f"{part.path}:{number}{name[found.end() :]}"
    return name
