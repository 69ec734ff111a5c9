"""Infilling: a model trained with fill-in-the-middle writes what stands between a prefix and a suffix.

Also an evaluation of it: from each of some held-out texts a line is taken out, the model fills the gap, and its text is
compared with the line (single-line infilling, as of InCoder and SantaCoder).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefoundry.config import UserError
from moefoundry.config.schema_data import FimFormat
from moefoundry.data.fim import Sentinels
from moefoundry.evaluation.generation import Choice, generate, most_likely
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.model.transformer import MoETransformer


@dataclass(frozen=True)
class Gap:
    """Text with a part taken out: ``prefix + middle + suffix`` is all of it."""

    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True)
class InfillingScores:
    """Scores of an evaluation.

    Attributes:
        exact_match: Share of gaps that were filled with the very text, blanks at its ends aside.
        edit_similarity: Mean of :func:`edit_similarity`.
        completions: Texts of the model, in the order of the gaps.
    """

    exact_match: float
    edit_similarity: float
    completions: list[str]


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
        key = "train_loader.dataset.fim"
        self.tokenizer = tokenizer
        self.suffix_first = (recipe or {}).get(f"{key}.format") == FimFormat.spm
        self.sentinels = Sentinels.of(tokenizer.backend, str(place), (recipe or {}).get(f"{key}.sentinels"))

    def prompt(self, prefix: str, suffix: str) -> Tensor:
        """Make the prompt that the middle continues, int64 [S]; both texts may be empty.

        Raises:
            UserError: One of them is no text.
        """
        s, before, behind = self.sentinels, self._ids("prefix", prefix), self._ids("suffix", suffix)
        if self.suffix_first:
            ids = [s.prefix, s.suffix, *behind, s.middle, *before]
        else:
            ids = [s.prefix, *before, s.suffix, *behind, s.middle]
        return torch.tensor(ids, dtype=torch.int64)

    def fill(
        self, model: MoETransformer, prefix: str, suffix: str, max_new_tokens: int, choose: Choice = most_likely
    ) -> Iterator[str]:
        """Yield the text between, as it comes, up to an end token.

        Args:
            model: In evaluation mode.
            prefix: Text before the gap.
            suffix: Text behind it.
            max_new_tokens: Tokens to add at most.
            choose: Picks each token.
        """
        ids = self.prompt(prefix, suffix)
        new_ids = generate(model, ids.to(next(model.parameters()).device), max_new_tokens, choose)
        yield from self.tokenizer.decode_stream(ids, new_ids)

    def _ids(self, name: str, text: str) -> list[int]:
        backend = self.tokenizer.backend
        spelled_out, backend.encode_special_tokens = backend.encode_special_tokens, True  # text is text
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError):  # lone surrogates, which stand for what was not UTF-8
            raise UserError(f"{name}={text!a}: not UTF-8") from None
        finally:
            backend.encode_special_tokens = spelled_out
        return ids


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


def evaluate_infilling(gaps: Sequence[Gap], fill: Callable[[str, str], str]) -> InfillingScores:
    """Fill gaps and compare.

    Args:
        gaps: At least one.
        fill: Gives the text between a prefix and a suffix. What stands behind its first line is not counted.

    Raises:
        UserError: There are no gaps.
    """
    if not gaps:
        raise UserError("infilling: no text has three lines, of which one could be taken out")
    completions = [fill(gap.prefix, gap.suffix) for gap in gaps]
    lines = [completion.lstrip("\n").partition("\n")[0].strip() for completion in completions]
    pairs = list(zip(lines, (gap.middle.strip() for gap in gaps), strict=True))
    return InfillingScores(
        exact_match=sum(line == middle for line, middle in pairs) / len(pairs),
        edit_similarity=sum(edit_similarity(*pair) for pair in pairs) / len(pairs),
        completions=completions,
    )


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
