"""The held-out split.

A document's split follows from the seed and its key alone: a file's relative path, or a record's text, so that exact
duplicates never lie on both sides. It does not change when other documents come or go.

In a small corpus chance may leave a split without a sample. Then the share is moved, as little as is needed
(:func:`moved`), and where no share gives both a sample, as with a lone document, the end of the text is held out
(:class:`Division` by position); the document there is cut at a line break, if one is near.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from moefoundry.data.corpus import Document

NEAR = 1 << 16  # characters within which a line break is looked for


class Split(StrEnum):
    """Name of a split."""

    train = "train"
    val = "val"


@dataclass(frozen=True)
class Division:
    """Division of documents into splits.

    Attributes:
        val_fraction: Expected share of the documents that are held out, or the share of bytes if by position.
        train_bytes: By position only: the bytes of UTF-8 text that come before the cut.
    """

    val_fraction: float
    train_bytes: int | None = None

    def divide(self, documents: Iterable[Document], seed: int, position: int = 0) -> Iterator[tuple[Split, Document]]:
        """Yield each document with its split, in order; by position, also the two parts of one.

        Args:
            documents: Consecutive documents of the corpus.
            seed: Decides the split where the position does not.
            position: Bytes of UTF-8 text before them.
        """
        if self.train_bytes is None:
            yield from ((split_of(document, self.val_fraction, seed), document) for document in documents)
            return
        for document in documents:
            size = len(document.text.encode())
            cut = _cut(document.text, self.train_bytes - position)
            position += size
            for split, text in ((Split.train, document.text[:cut]), (Split.val, document.text[cut:])):
                if text and not text.isspace():
                    yield split, document._replace(text=text)


def split_of(document: Document, val_fraction: float, seed: int) -> Split:
    """Return the split of a document; ``val_fraction`` is the expected share of files (documents for JSONL)."""
    return Split.val if unit_hash(document.split_key, seed) < val_fraction else Split.train


def unit_hash(key: str, seed: int) -> float:
    """Hash a key to a number in [0, 1), the same on every machine and in every release."""
    data = f"{seed}\0{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


def moved(documents: Iterable[Document], val_fraction: float, seed: int, needed_bytes: float) -> Division | None:
    """Find the division nearest to a share that gives both splits the bytes they need; None if there is none."""
    sizes: dict[float, int] = {}
    for document in documents:
        key = unit_hash(document.split_key, seed)
        sizes[key] = sizes.get(key, 0) + len(document.text.encode())
    total, held_out = sum(sizes.values()), 0
    possible = []
    for key in sorted(sizes):
        if held_out >= needed_bytes and total - held_out >= needed_bytes:
            possible.append(key)  # all before this one are held out
        held_out += sizes[key]
    return Division(min(possible, key=lambda key: abs(key - val_fraction))) if possible else None


def by_position(total_bytes: int, val_fraction: float, needed_bytes: float) -> Division:
    """Hold out the last ``val_fraction`` of the text, but enough; at most half where there is little."""
    held_out = max(val_fraction * total_bytes, min(needed_bytes, total_bytes / 2))
    held_out = min(held_out, max(total_bytes - needed_bytes, total_bytes / 2))
    return Division(held_out / total_bytes, total_bytes - int(held_out))


def _cut(text: str, position: int) -> int:
    """Return the index of the character behind ``position`` bytes, or behind the last line break shortly before."""
    if position <= 0:
        return 0
    data = text.encode()
    if position >= len(data):
        return len(text)
    characters = len(data[:position].decode(errors="ignore"))
    line = text.rfind("\n", max(0, characters - NEAR, characters // 2), characters) + 1
    return line or characters
