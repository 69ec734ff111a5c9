"""Tokens of prompts and text of new tokens, in one way for the command, a run's report and evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moefoundry.checkpoint.manifest import read_state
from moefoundry.checkpoint.weights import read_model_config, tokenizer_of
from moefoundry.config import UserError
from moefoundry.data.tokenizer import check_vocabulary
from moefoundry.data.tokenizer_files import end_token_ids

NO_TOKENIZER = "the checkpoint has no tokenizer, and its recipe names none (tokenizer.name)"


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer for prompts, which may spell special tokens out.

    Attributes:
        backend: The ``tokenizers`` object, which neither pads nor truncates.
        end_ids: Tokens that end a text.
    """

    backend: Tokenizer
    end_ids: frozenset[int] = frozenset()

    @classmethod
    def open(cls, directory: Path, model_vocab_size: int) -> PromptTokenizer:
        """Open the tokenizer of a directory.

        Raises:
            UserError: It is absent or unreadable, or has tokens that the model lacks.
        """
        backend = check_vocabulary(directory, model_vocab_size)
        backend.encode_special_tokens = False
        return cls(backend, end_token_ids(directory))

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> PromptTokenizer:
        """Open the tokenizer of a checkpoint, or else that of its run.

        Raises:
            UserError: As :meth:`open`, or the checkpoint names none.
        """
        directory = tokenizer_of(checkpoint, read_state(checkpoint)["recipe"])
        if directory is None:
            raise UserError(f"{checkpoint}: {NO_TOKENIZER}")
        return cls.open(directory, read_model_config(checkpoint).vocab_size)

    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt as int64 [S], without tokens that the tokenizer would add, as training had none.

        Raises:
            UserError: There is no token, or the prompt is no text.
        """
        try:
            ids = self.backend.encode(prompt, add_special_tokens=False).ids
        except (UnicodeError, TypeError):  # lone surrogates, which stand for what was not UTF-8
            raise UserError(f"prompt={prompt!a}: not UTF-8") from None
        if not ids:
            raise UserError(f"prompt={prompt!r}: has no token")
        return torch.tensor(ids, dtype=torch.int64)

    def decode_stream(self, prompt_ids: Tensor, new_ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of new tokens as they come, up to an end token; half a character waits for the next token.

        All tokens are decoded again for each new one, the prompt's too: the text of a token may depend on those before
        it, such as the blank before a word.
        """
        ids: list[int] = prompt_ids.tolist()
        text = shown = self.backend.decode(ids)
        for token in takewhile(lambda token: token not in self.end_ids, new_ids):
            ids.append(token)
            text = self.backend.decode(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        if text != shown:
            yield text[len(shown) :]

    def text_after(self, prompt_ids: Sequence[int], new_ids: Iterable[int]) -> str:
        """Give the text of new tokens behind a prompt, up to an end token."""
        kept = takewhile(lambda token: token not in self.end_ids, new_ids)
        text: str = self.backend.decode([*prompt_ids, *kept])
        return text[len(self.backend.decode([*prompt_ids])) :]

    def has_ended(self, prompt_ids: Sequence[int], new_ids: Sequence[int], stops: Sequence[str]) -> bool:
        """Tell whether the last of the new tokens ends a text, or one of the ``stops`` stands in it."""
        if new_ids[-1] in self.end_ids:
            return True
        text = self.text_after(prompt_ids, new_ids) if stops else ""
        return any(stop in text for stop in stops)
