"""Tokens of texts, piece by piece, with a memory of the pieces.

A tokenizer cuts a text into pieces such as words, blanks and numbers, by patterns, and its model makes tokens of each
piece, whatever stands around it. The ``tokenizers`` library keeps account of every character on the way, which takes
nearly all of its time. Here the same patterns cut the text, and the library's model sees each piece once.

The tokens are those of the library. Both must cut alike, and they know characters by tables of their own. So both are
shown each character once, in :data:`SURROUNDINGS`; a text with one that they cut differently is left to the library. So
are texts with added tokens, and all texts of tokenizers of which more than this would have to be known.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moefoundry.data.patterns import translated

MOST_PIECES = 250_000  # remembered in a process: about 60 MB
LONGEST_PIECE = 64  # characters of one that is remembered
SURROUNDINGS = "a{0}b1{0}2 {0} {0}{0}.{0}.\n{0}\n\n {0}  {0}A'{0}e{0}'s'{0}\t{0}"
ASCII, WIDE = 0x80, 0x10000  # characters that patterns are translated for; further ones are cut differently, or not
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Pattern of ``ByteLevel``, GPT-2's."""
SPLIT = ("Split", "Isolated", False)
"""Type, behaviour and inversion of a step that cuts before and behind each match."""
NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # which leave ASCII as it is


class _Memory(dict[str, bytes]):
    """Tokens of pieces, as bytes of uint32; a piece that is not there is given to the model."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = [byte for byte in range(256) if byte not in printable]
        self._letters = {byte: 0x100 + number for number, byte in enumerate(others)}  # of byte-level vocabularies
        self._tokenize = backend.model.tokenize

    def __missing__(self, piece: str) -> bytes:
        letters = piece.encode().decode("latin-1").translate(self._letters)
        tokens = array("I", [token.id for token in self._tokenize(letters)]).tobytes()
        if len(self) < MOST_PIECES and len(piece) <= LONGEST_PIECE:
            self[piece] = tokens
        return tokens


class PieceEncoder:
    """Encoder of the texts of one tokenizer; :meth:`of` makes it, if there can be one.

    Args:
        backend: The tokenizer.
        patterns: Patterns that cut a text, each what the one before has left in one piece.
        added: Texts of added tokens, which are left to the library.
        ascii_only: Leave texts of other characters to the library, too.
    """

    def __init__(self, backend: Tokenizer, patterns: list[str], added: list[str], ascii_only: bool) -> None:
        self._backend = backend
        self._patterns = patterns
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._ascii_only = ascii_only
        self._memory = _Memory(backend)
        self._alike: set[str] = set()
        self._unlike: set[str] = set()

    @classmethod
    def of(cls, backend: Tokenizer, description: Mapping[str, Any]) -> PieceEncoder | None:
        """Make the encoder of a byte-level tokenizer that cuts texts by patterns; None for one of another kind.

        Args:
            backend: The tokenizer, which reads no special token out of a text.
            description: Content of its tokenizer.json.
        """
        patterns, normal = _patterns_of(description.get("pre_tokenizer")), description.get("normalizer")
        if patterns is None or any(translated(pattern, ASCII) is None for pattern in patterns):
            return None
        if description["model"].get("dropout") or not backend.encode_special_tokens:
            return None
        if normal is not None and normal.get("type") not in NORMAL_FORMS:
            return None
        added = [token["content"] for token in description.get("added_tokens", []) if not token["special"]]
        encoder = cls(backend, patterns, added, ascii_only=normal is not None)
        return encoder if encoder._cuts_alike({chr(number) for number in range(ASCII)}) else None

    def encode(self, text: str, behind: bytes) -> NDArray[np.uint32] | None:
        """Encode a text, [N]; None if the library must do it.

        Args:
            text: The text.
            behind: Tokens to put behind its own, as bytes of uint32.
        """
        if not text.isascii() and (self._ascii_only or not self._cuts_alike(set(text))):
            return None
        if self._added is not None and self._added.search(text):
            return None
        return np.frombuffer(b"".join(map(self._memory.__getitem__, self._pieces(text))) + behind, np.uint32)

    @cached_property
    def _ascii(self) -> list[re.Pattern[str]]:
        return [found for pattern in self._patterns if (found := translated(pattern, ASCII))]

    @cached_property
    def _wide(self) -> list[re.Pattern[str]]:
        return [found for pattern in self._patterns if (found := translated(pattern, WIDE))]

    def _pieces(self, text: str) -> list[str]:
        first, *others = self._ascii if text.isascii() else self._wide
        pieces = _cut(text, first)
        for pattern in others:
            pieces = [part for piece in pieces for part in _cut(piece, pattern)]
        return pieces

    def _cuts_alike(self, characters: set[str]) -> bool:
        """Tell if the library cuts around all of these characters as is done here."""
        for character in characters - self._alike - self._unlike:
            text = SURROUNDINGS.format(character)
            theirs = [end - start for _, (start, end) in self._backend.pre_tokenizer.pre_tokenize_str(text)]
            alike = theirs == [len(piece) for piece in self._pieces(text) if piece]
            (self._alike if alike else self._unlike).add(character)
        return self._unlike.isdisjoint(characters)


def _cut(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Cut before and behind each match."""
    found: list[str] = pattern.findall(text)
    if sum(map(len, found)) == len(text):
        return found
    edges = [0, *(edge for match in pattern.finditer(text) for edge in match.span()), len(text)]
    return [text[start:end] for start, end in pairwise(edges) if start < end]


def _patterns_of(pre_tokenizer: Any) -> list[str] | None:
    """Read the patterns of a byte-level tokenizer; None if it does more than to cut by patterns."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if any((each.get("type"), each.get("behavior"), each.get("invert")) != SPLIT for each in splits):
        return None
    patterns = [each["pattern"].get("Regex") for each in splits] + ([WORDS] if last.get("use_regex", True) else [])
    return patterns if patterns and all(patterns) else None
