"""Fill-in-the-middle (arXiv 2207.14255): some documents are reordered so that a model learns to fill a gap.

A document ``prefix middle suffix`` becomes, with three special tokens of the tokenizer,

    psm    BEGIN prefix HOLE suffix END middle       as DeepSeek-V3 (arXiv 2412.19437), for a tenth of the documents
    spm    BEGIN HOLE suffix END prefix middle       the suffix first, so that the prefix and the middle are one text

and its end-of-text token stays at its end. Both read the same way back: :func:`restored`.

Which documents, and where they are divided, follows from the seed, the epoch, the stream and the number of the document
alone, by a hash. So it does not matter who reads a document, when, or how often. The hash is SplitMix64 (Steele, Lea
and Flood, 2014), computed for all documents at once: a packing plan must know their lengths.

Documents are divided between tokens, or between characters, as whoever edits a text stands within a token. Text that is
divided there is encoded anew, part by part. The plan leaves :data:`SPARE_TOKENS` for that; a document that would not
fit, or that does not come back from its text, is divided between tokens after all.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moefoundry.config.errors import UserError
from moefoundry.config.schema_data import FimConfig, FimFormat, FimSplit
from moefoundry.data.tokenizer import FIM_TOKENS, TextTokenizer, with_special_tokens

SENTINELS = 3
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPARE_TOKENS = 8
"""Tokens that a document divided between characters may gain."""

SPELLINGS = (
    FIM_TOKENS,
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek  # noqa: RUF001
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),  # Codestral
)
"""The sentinels of known tokenizers: before the prefix, before the suffix, before the middle."""


@dataclass(frozen=True)
class Sentinels:
    """Ids of the special tokens before the parts of a document."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, backend: Tokenizer, place: str | Path, names: Sequence[str] | None = None) -> Sentinels:
        """Find the sentinels of a tokenizer.

        Args:
            backend: The tokenizer.
            place: Where it lies, for the error.
            names: Their spellings; None tries :data:`SPELLINGS`.

        Raises:
            UserError: It lacks them.
        """
        for spelling in SPELLINGS if names is None else (names,):
            ids = [backend.token_to_id(name) for name in spelling]
            if None not in ids:
                return cls(*ids)
        if names is not None:
            lacking = [name for name in names if backend.token_to_id(name) is None]
            raise UserError(f"{place}: the tokenizer has no {' and no '.join(lacking)} (the recipe's fim.sentinels)")
        raise UserError(
            f"{place}: the tokenizer has no special tokens for fill-in-the-middle, such as {', '.join(SPELLINGS[1])}; "
            "name its own in dataset.fim.sentinels, add them (`moefoundry prepare --add-fim-tokens`), or fim=null"
        )


def with_sentinels(tokenizer: TextTokenizer) -> TextTokenizer:
    """Add the special tokens of fill-in-the-middle to a tokenizer, unless it has those of a known one."""
    names = (set(tokenizer.backend.get_vocab(with_added_tokens=True)) >= set(spelling) for spelling in SPELLINGS)
    return tokenizer if any(names) else with_special_tokens(tokenizer, FIM_TOKENS)


class Draws:
    """Random numbers of documents, which depend on nothing but these arguments.

    Args:
        seed: Seed of the run's data.
        epoch: The epoch.
        stream: Name of the stream that the documents are of.
    """

    def __init__(self, seed: int, epoch: int, stream: str = "") -> None:
        with np.errstate(over="ignore"):
            key = _mixed(np.array([seed], np.uint64))
            for word in (epoch, zlib.crc32(stream.encode())):
                key = _mixed(key + np.array([word], np.uint64))
        self._key = key

    def uniform(self, documents: NDArray[Any], number: int) -> NDArray[np.float64]:
        """Draw one number from [0, 1) for each document, [N]; another ``number`` draws others."""
        with np.errstate(over="ignore"):
            bits = _mixed(_mixed(self._key + documents.astype(np.uint64)) + np.uint64(number))
        return (bits >> np.uint64(11)) * 2.0**-53

    def of(self, document: int, numbers: int) -> list[float]:
        """Draw the numbers 0, 1, ... of one document."""
        with np.errstate(over="ignore"):
            bits = _mixed(_mixed(self._key + np.array([document], np.uint64)) + np.arange(numbers, dtype=np.uint64))
        return ((bits >> np.uint64(11)) * 2.0**-53).tolist()


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Advance SplitMix64 from each state and give its output; overflow is meant."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class FillInTheMiddle:
    """The reordering of the documents of one stream in one epoch.

    Args:
        cfg: The recipe's.
        sentinels: Those of the tokenizer.
        draws: The random numbers.
        longest: A longer document is divided between tokens in any case.
        backend: The tokenizer, for documents divided between characters.
    """

    def __init__(
        self, cfg: FimConfig, sentinels: Sentinels, draws: Draws, longest: int, backend: Tokenizer | None = None
    ) -> None:
        self.cfg = cfg
        self.sentinels = sentinels
        self.draws = draws
        self.longest = longest
        self._backend = backend if cfg.split == FimSplit.characters else None

    def lengths(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Give the tokens that each document takes at most, from those that it has, [N]."""
        chosen = (self.draws.uniform(np.arange(len(lengths)), 0) < self.cfg.rate) & (lengths > 1)
        longer = np.where(chosen, lengths + SENTINELS, lengths)
        if self._backend is not None:
            spared = chosen & (lengths + SENTINELS + SPARE_TOKENS <= self.longest)
            longer = np.where(spared, longer + SPARE_TOKENS, longer)
        return longer.astype(np.int32)

    def apply(self, document: int, tokens: NDArray[Any], room: int) -> NDArray[Any]:
        """Reorder a document, if it is one of those.

        Args:
            document: Its number in the stream.
            tokens: Its tokens [n], the last of which is its end-of-text token.
            room: What :meth:`lengths` gave for it; the result is not longer.
        """
        if room == len(tokens):
            return tokens
        _, first, second, form = self.draws.of(document, 4)
        suffix_first = self.cfg.format == FimFormat.spm or (self.cfg.format == FimFormat.mixed and form < 0.5)
        low, high = sorted((first, second))
        parts: tuple[Any, Any, Any] | None = None
        if self._backend is not None and room > len(tokens) + SENTINELS:
            parts = self._parts_of_text(tokens[:-1], low, high, room - SENTINELS - 1)
        if parts is None:
            begin, end = int(low * len(tokens)), int(high * len(tokens))  # from 0 to n - 1, the end-of-text token
            parts = (tokens[:begin], tokens[begin:end], tokens[end:-1])
        prefix, middle, suffix = parts
        s = self.sentinels
        nothing: list[int] = []
        before, behind = (nothing, prefix) if suffix_first else (prefix, nothing)
        pieces = ([s.prefix], before, [s.suffix], suffix, [s.middle], behind, middle, tokens[-1:])
        return np.concatenate([np.asarray(piece, tokens.dtype) for piece in pieces])

    def _parts_of_text(
        self, tokens: NDArray[Any], low: float, high: float, room: int
    ) -> tuple[list[int], list[int], list[int]] | None:
        """Divide between characters; None if the parts do not fit, or do not give the text back."""
        assert self._backend is not None, "documents are divided between characters"
        text = self._backend.decode(tokens.tolist(), skip_special_tokens=False)
        if REPLACEMENT in text:  # parts of characters, which do not come back
            return None
        begin, end = int(low * (len(text) + 1)), int(high * (len(text) + 1))
        parts = [
            self._backend.encode(part, add_special_tokens=False).ids
            for part in (text[:begin], text[begin:end], text[end:])
        ]
        prefix, middle, suffix = parts
        joined = prefix + middle + suffix
        if len(joined) > room or self._backend.decode(joined, skip_special_tokens=False) != text:
            return None
        return prefix, middle, suffix


def restored(tokens: NDArray[Any], sentinels: Sentinels) -> NDArray[Any]:
    """Put the parts of a document back into the order of its text; one that is in that order stays as it is.

    Args:
        tokens: Tokens of a whole document, in either format.
        sentinels: Those of its tokenizer.
    """
    if not len(tokens) or tokens[0] != sentinels.prefix:
        return tokens
    (hole,), (end,) = np.flatnonzero(tokens == sentinels.suffix)[:1], np.flatnonzero(tokens == sentinels.middle)[:1]
    return np.concatenate([tokens[1:hole], tokens[end + 1 : -1], tokens[hole + 1 : end], tokens[-1:]])
