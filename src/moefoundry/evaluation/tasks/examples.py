"""Examples of tasks: JSON Lines, at a path or behind a URL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moefoundry.config import UserError
from moefoundry.config.urls import is_url, resolved, url_problem
from moefoundry.data.stores import Remote

Example = Mapping[str, Any]
CATEGORY = "category"
HF = "hf://"


def is_remote(uri: str) -> bool:
    """Tell if examples have to be fetched, from where they can be."""
    return not uri.startswith(HF) and not url_problem(uri) and is_url(resolved(uri))


def read_examples(uri: str) -> dict[int, Example]:
    """Read the examples of a task, by the numbers of their lines.

    Raises:
        UserError: The file is absent or cannot be fetched, a line is no JSON object, or there is none.
    """
    if uri.startswith(HF):
        raise UserError(f"{uri}: examples are read from JSON Lines; write the data set as such a file first")
    if problem := url_problem(uri):
        raise UserError(f"{uri}: {problem}")
    if not is_url(place := resolved(uri)):
        return _read(Path(place), uri)
    with TemporaryDirectory(prefix="moefoundry-") as scratch:
        parent, _, name = place.rpartition("/")
        file = Path(scratch) / "examples.jsonl"
        Remote(parent).download(name, file)
        return _read(file, uri)


def _read(file: Path, shown: str) -> dict[int, Example]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{shown}: cannot be read: {reason}") from None
    examples: dict[int, Example] = {}
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: texts may hold other ends of lines
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{shown}: line {number}: not JSON: {error}") from None
        if not isinstance(example, dict):
            raise UserError(f"{shown}: line {number}: not a JSON object")
        examples[number] = example
    if not examples:
        raise UserError(f"{shown}: holds no example")
    return examples


def text_at(example: Example, key: str) -> str:
    """Give a text of an example.

    Raises:
        UserError: It is absent, or no string.
    """
    value = example.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key}: {wrong(example, key)}, not a text")
    return value


def texts_at(example: Example, key: str) -> Sequence[str]:
    """Give a list of texts of an example.

    Raises:
        UserError: It is absent, empty, or has other elements.
    """
    value = example.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise UserError(f"{key}: {wrong(example, key)}, not a list of texts")
    return value


def gold_of(example: Example, choices: int) -> int:
    """Give the number of the right one among several.

    Raises:
        UserError: It is absent or out of range.
    """
    gold = example.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < choices:
        raise UserError(f"gold: {wrong(example, 'gold')}, not a number from 0 to {choices - 1}")
    return gold


def wrong(example: Example, key: str) -> str:
    """Say what stands at a key, or that nothing does."""
    return f"got {json.dumps(example[key])[:60]}" if key in example else f"absent among {', '.join(example)}"
