"""Infilling: a model trained with fill-in-the-middle writes what stands between a prefix and a suffix.

Prompts for it, gaps in held-out texts, and the comparison of texts. A gap of one line is judged by the first line that
the model writes (single-line infilling, as of InCoder and SantaCoder).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefoundry.config import UserError
from moefoundry.config.schema_data import FimFormat
from moefoundry.data.fim import SENTINELS, Sentinels
from moefoundry.evaluation.prompts import PromptTokenizer

FIM = "train_loader.dataset.fim"
"""Key of the recipe that says how a model was trained."""


@dataclass(frozen=True)
class Gap:
    """Text with a part taken out: ``prefix + middle + suffix`` is all of it."""

    prefix: str
    middle: str
    suffix: str


class Infiller:
    """Prompts for a gap, in the order of the parts that the model was trained with.

    Args:
        tokenizer: The model's own.
        place: Where it is from, for errors.
        recipe: The model's flat recipe, whose ``fim`` says the order and the special tokens; others are usual ones.

    Raises:
        UserError: The tokenizer has no special tokens for fill-in-the-middle.
    """

    def __init__(self, tokenizer: PromptTokenizer, place: object, recipe: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.suffix_first = (recipe or {}).get(f"{FIM}.format") == FimFormat.spm
        self.sentinels = Sentinels.of(tokenizer.backend, str(place), (recipe or {}).get(f"{FIM}.sentinels"))

    def prompt(self, prefix: str, suffix: str, room: int | None = None) -> Tensor:
        """Make the prompt that the middle continues, int64 [S]; both texts may be empty.

        Args:
            prefix: Text before the gap.
            suffix: Text behind it.
            room: Tokens of the prompt at most: the prefix loses its beginning, and the suffix its end. None keeps all.

        Raises:
            UserError: One of them is no text, or there is no room for the special tokens.
        """
        s, before, behind = self.sentinels, self.ids("prefix", prefix), self.ids("suffix", suffix)
        if room is not None:
            before, behind = _nearest(before, behind, room - SENTINELS)
        if self.suffix_first:
            ids = [s.prefix, s.suffix, *behind, s.middle, *before]
        else:
            ids = [s.prefix, *before, s.suffix, *behind, s.middle]
        return torch.tensor(ids, dtype=torch.int64)

    def ids(self, name: str, text: str) -> list[int]:
        """Encode a text, in which special tokens are text.

        Raises:
            UserError: It is no text; ``name`` is named.
        """
        backend = self.tokenizer.backend
        spelled_out, backend.encode_special_tokens = backend.encode_special_tokens, True
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError):  # lone surrogates, which stand for what was not UTF-8
            raise UserError(f"{name}={text!a}: not UTF-8") from None
        finally:
            backend.encode_special_tokens = spelled_out
        return ids


def _nearest(before: list[int], behind: list[int], room: int) -> tuple[list[int], list[int]]:
    """Keep what stands nearest to a gap, half of the room for each side where both have more."""
    if room < 0:
        raise UserError("there is no room for the special tokens of a prompt; raise max_seq_len")
    behind = behind[: max(room // 2, room - len(before))]
    return before[max(len(before) + len(behind) - room, 0) :], behind


def lines_taken_out(texts: Iterable[str], seed: int = 0) -> Iterator[Gap]:
    """Take a line out of each text that has three or more that are not blank: one between the first and the last.

    Which one follows from the seed and the text alone. The line keeps its indentation in the prefix and its end in the
    suffix.
    """
    for text in texts:
        lines = text.splitlines(keepends=True)
        full = [number for number, line in enumerate(lines) if line.strip()]
        if len(full) < 3:
            continue
        rng = np.random.default_rng([seed, zlib.crc32(text.encode())])
        number = int(rng.choice(full[1:-1]))
        line = lines[number]
        middle = line.strip()
        begin = sum(map(len, lines[:number])) + line.index(middle)
        yield Gap(text[:begin], middle, text[begin + len(middle) :])


def is_one_line(middle: str) -> bool:
    """Tell if a gap is of one line, so that what stands behind the first line of a completion does not count."""
    return "\n" not in middle.strip("\n")


def first_line(text: str) -> str:
    """Give the first line of a text that begins behind line breaks, if it has any."""
    return text.lstrip("\n").partition("\n")[0]


def edit_similarity(first: str, second: str) -> float:
    """Compute 1 less the Levenshtein distance over the longer length: 1 for equal texts, 0 for entirely other ones."""
    if not first or not second:
        return float(first == second)
    columns = np.arange(len(second) + 1)
    letters, distances = np.array(list(second)), columns
    for number, letter in enumerate(first, 1):
        replaced = distances[:-1] + (letters != letter)
        best = np.concatenate([[number], np.minimum(replaced, distances[1:] + 1)])
        distances = np.minimum.accumulate(best - columns) + columns  # insertions, one after the other
    return 1 - int(distances[-1]) / max(len(first), len(second))
