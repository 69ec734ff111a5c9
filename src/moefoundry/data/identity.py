"""Identity of data, wherever they lie: digests that a run stores and compares.

A stream is one directory of shards, such as ``OUT/train``. Its digest follows from its index alone: the encoding of the
samples, and the number of samples, the size and the hashes of every shard, in order. The order counts, since the order
in which samples are read follows from it. Where the data lie, how the files are called, and when they were written do
not count, so a copy, a remote and its local cache have the same digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError

INDEX_FILE = "index.json"
TOKENS = "tokens"
TARGETS = "targets"
"""Names of the columns of tokens and, of instruction data, of what says which of them are to be predicted."""


def read_shards(directory: Path) -> list[dict[str, Any]]:
    """Read the shards in the index of a stream; of remote data it is in the local cache.

    Raises:
        UserError: The index is absent or damaged.
    """
    file = directory / INDEX_FILE
    try:
        shards: list[dict[str, Any]] = json.loads(file.read_text())["shards"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    return shards


def column_encodings(directory: Path) -> dict[str, set[str]]:
    """Map the columns of a stream's samples to their encodings in its shards, such as ``ndarray:uint16:512``.

    Raises:
        UserError: The index is absent or damaged, or has no tokens.
    """
    found: dict[str, set[str]] = {}
    try:
        for shard in read_shards(directory):
            for name, encoding in zip(shard["column_names"], shard["column_encodings"], strict=True):
                found.setdefault(name, set()).add(encoding)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / INDEX_FILE}: cannot be read: {error!r}") from error
    if TOKENS not in found:
        raise UserError(f"{directory / INDEX_FILE}: samples without {TOKENS}; not what `moefoundry prepare` writes")
    return found


def holds_documents(directory: Path) -> bool:
    """Tell whether the samples of a stream are documents of any length, which are packed when they are read.

    Raises:
        UserError: The index is absent or damaged.
    """
    return all(encoding.count(":") == 1 for encoding in column_encodings(directory)[TOKENS])


def stream_digest(directory: Path) -> str:
    """Compute the SHA-256, in hex, of a stream's content. Shards without hashes count by their sizes alone.

    Raises:
        UserError: The index is absent or damaged.
    """
    try:
        shards = [
            {
                "columns": [shard["column_names"], shard["column_encodings"]],
                "samples": shard["samples"],
                "bytes": shard["raw_data"]["bytes"],
                "hashes": shard["raw_data"]["hashes"],
            }
            for shard in read_shards(directory)
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / INDEX_FILE}: cannot be read: {error!r}") from error
    return _digest(shards)


def corpus_digest(tokenizer_sha256: str, eos_id: int, streams: Mapping[str, str]) -> str:
    """Compute the SHA-256, in hex, of a prepared corpus: its tokenizer and the digest of each stream, by name.

    The digest of a stream covers token ids, whose meaning the tokenizer decides; compare the tokenizers, too.
    """
    return _digest({"tokenizer": tokenizer_sha256, "eos_id": eos_id, "streams": dict(streams)})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
