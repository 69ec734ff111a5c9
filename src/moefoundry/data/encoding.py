"""From the text of a document to what is stored of it: its tokens, and the marks of those that are to be predicted.

Documents of a corpus are texts, or records of instructions or of preferences, whose text is the record as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefoundry.config.errors import UserError
from moefoundry.data.instructions import (
    Encoded,
    RecordError,
    Targets,
    TooLong,
    encode_record,
    load_chat_tokenizer,
    truncated,
)
from moefoundry.data.left_out import Reason
from moefoundry.data.options import Kind, PrepareOptions
from moefoundry.data.preferences import encode_preference
from moefoundry.data.tokenizer import TextTokenizer, settings_digest, settings_files

SETTINGS = "tokenizer_settings"
"""Key of the inputs of records; corpora of earlier versions lack it."""


class Stored(NamedTuple):
    """Tokens and targets of one document.

    Attributes:
        tokens: Integers [N], the end-of-text token included.
        targets: uint8 [N]; None where every token is to be predicted.
        cut: Tokens that were cut off its end.
    """

    tokens: NDArray[Any]
    targets: NDArray[np.uint8] | None = None
    cut: int = 0


class Refused(NamedTuple):
    """A record that gives no document, and why."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class RecordEncoder:
    """Encodes records of instructions, a document each, or of preferences, two documents each.

    Attributes:
        tokenizer: Directory of the tokenizer.
        kind: Kind of the records.
        targets: Tokens of instructions that are to be predicted.
        max_tokens: Tokens of a document, at most; None is any number.
        too_long: Treatment of records with more.
    """

    tokenizer: Path
    kind: Kind
    targets: Targets
    max_tokens: int | None
    too_long: TooLong

    @classmethod
    def of(cls, options: PrepareOptions) -> RecordEncoder | None:
        """Make the encoder that ``options`` ask for; None for plain text.

        Raises:
            UserError: Records need a tokenizer; or the options of the targets are bad.
        """
        if options.kind is Kind.text:
            return None
        if options.tokenizer is None:
            raise UserError(f"{options.kind} need a tokenizer, with a chat template for messages: tokenizer=...")
        targets = Targets(options.target_responses, options.target_prompts)
        _tokenizer_in(options.tokenizer)
        return cls(options.tokenizer, options.kind, targets, options.max_tokens, options.too_long)

    def inputs(self) -> dict[str, Any]:
        """Collect what decides the result, beside the records and the tokenizer's vocabulary."""
        return {
            "kind": self.kind.value,
            "target_responses": self.targets.responses.value,
            "target_prompts": self.targets.prompts,
            "max_tokens": self.max_tokens,
            "too_long": None if self.max_tokens is None else self.too_long.value,
            "chat_template": getattr(_tokenizer_in(self.tokenizer), "chat_template", None),
            SETTINGS: _settings_of(self.tokenizer),
        }

    def encode(self, text: str, name: str) -> list[Stored] | Refused:
        """Encode one record, given as JSON.

        Raises:
            UserError: It is too long, and this is to be an error.
        """
        try:
            record, tokenizer = json.loads(text), _tokenizer_in(self.tokenizer)
            if self.kind is Kind.preferences:
                found: Sequence[Encoded] = encode_preference(record, tokenizer)
            else:
                found = [encode_record(record, tokenizer, self.targets)]
        except RecordError as error:
            return Refused(Reason.bad_record, str(error))
        longest = max(len(each.tokens) for each in found)
        if self.max_tokens is None or longest <= self.max_tokens:
            return [Stored(*each) for each in found]
        if self.too_long is TooLong.error:
            raise UserError(f"{name}: {longest} tokens, and max_tokens={self.max_tokens}; or too_long=truncate")
        if self.too_long is TooLong.drop:
            return Refused(Reason.too_long, f"{longest} tokens")
        try:
            kept = [truncated(each, self.max_tokens) for each in found]
        except RecordError as error:
            return Refused(Reason.too_long, str(error))
        return [Stored(*new, len(old.tokens) - len(new.tokens)) for old, new in zip(found, kept, strict=True)]


def encode_texts(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[Stored]]:
    """Encode texts, a document each."""
    return [[Stored(tokens)] for tokens in tokenizer.encode_batch(texts, ended=True)]


@cache
def _settings_of(directory: Path) -> str:
    return settings_digest(settings_files(directory))


@cache
def _tokenizer_in(directory: Path) -> Any:
    return load_chat_tokenizer(directory)
