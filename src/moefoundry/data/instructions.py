"""Instruction data: a record with prompts and responses becomes tokens, with a mark on those that are to be predicted.

The formats, and their tokens, are those of LLM Foundry's finetuning data:

    {"prompt": "...", "response": "..."}       or ``completion`` in place of ``response``
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

Messages are written out by the tokenizer's chat template, or by ChatML where it has none. Each message of the assistant
ends a *turn*: what it says is the turn's response, and all before it, since the last response, its prompt. Prompts and
responses are tokenized apart, so that the border between them is a border between tokens, as it is in generation. The
end-of-text token ends the last response, and is predicted with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefoundry.config.errors import UserError

PROMPT_KEYS = ("prompt",)
RESPONSE_KEYS = ("response", "completion")
MESSAGES_KEY = "messages"
ROLES = ("system", "user", "assistant", "tool")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATE = "26 Jul 2024"  # for templates that print one: today's would change the data from day to day
LENGTH = "length>="


class RecordError(ValueError):
    """A record that gives no tokens; the message says why, without its content."""


class TargetResponses(StrEnum):
    """Responses of a conversation that are to be predicted."""

    last = "last"
    all = "all"


class TooLong(StrEnum):
    """Treatment of a record of more than the most tokens that are wanted."""

    truncate = "truncate"
    drop = "drop"
    error = "error"


@dataclass(frozen=True)
class Targets:
    """Tokens that are to be predicted.

    Attributes:
        responses: The last response of a conversation, or all.
        prompts: Prompts, too: ``none``, ``all``, or ``length>=N``, those of at least N tokens.

    Raises:
        UserError: ``prompts`` is none of these.
    """

    responses: TargetResponses = TargetResponses.last
    prompts: str = "none"

    def __post_init__(self) -> None:
        length = self.prompts.removeprefix(LENGTH)
        if self.prompts not in ("none", "all") and (length == self.prompts or not length.isdigit() or not int(length)):
            raise UserError(f"target_prompts={self.prompts}: none, all, or {LENGTH}N with a number N above 0")

    def has_prompt(self, tokens: int) -> bool:
        """Tell if a prompt of so many tokens is to be predicted."""
        if self.prompts.startswith(LENGTH):
            return tokens >= int(self.prompts.removeprefix(LENGTH))
        return self.prompts == "all"

    def has_response(self, last: bool) -> bool:
        """Tell if a response is to be predicted."""
        return last or self.responses is TargetResponses.all


class Encoded(NamedTuple):
    """An encoded record.

    Attributes:
        tokens: int64 [N]; the end-of-text token is the last, unless the record was truncated.
        targets: uint8 [N], 1 where the token is to be predicted.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.uint8]


class Turn(NamedTuple):
    """A prompt and its response, as text or as tokens."""

    prompt: Any
    response: Any


def load_chat_tokenizer(directory: Path) -> Any:
    """Open a Hugging Face tokenizer directory with transformers, which renders chat templates in a sandbox.

    Raises:
        UserError: It is no tokenizer, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds
        raise UserError(f"{directory}: not a tokenizer that transformers opens: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no eos_token in tokenizer_config.json; responses need one")
    tokenizer.model_max_length = int(1e30)  # or it would warn of what is cut here
    return tokenizer


def encode_record(record: object, tokenizer: Any, targets: Targets) -> Encoded:
    """Encode a record of instructions.

    Args:
        record: A mapping in one of the formats; keys of other names are ignored.
        tokenizer: From :func:`load_chat_tokenizer`.
        targets: Tokens that are to be predicted.

    Raises:
        RecordError: The record is in none of the formats, or has an empty prompt or response.
    """
    if not isinstance(record, Mapping):
        raise RecordError("it is no mapping")
    if MESSAGES_KEY in record:
        return encode_turns([_tokens(turn, tokenizer) for turn in chat_turns(record, tokenizer)], tokenizer, targets)
    prompt, response = (_text_at(record, keys) for keys in (PROMPT_KEYS, RESPONSE_KEYS))
    return encode_turns([plain_turn(prompt, response, tokenizer)], tokenizer, targets)


def encode_turns(turns: Sequence[Turn], tokenizer: Any, targets: Targets) -> Encoded:
    """Join the tokens of turns, and mark those that are to be predicted.

    Raises:
        RecordError: A prompt or response has no tokens.
    """
    tokens: list[int] = []
    marks: list[bool] = []
    for number, (prompt, response) in enumerate(turns, start=1):
        last = number == len(turns)
        if not prompt or not response:
            raise RecordError(f"the {'response' if prompt else 'prompt'} of turn {number} is empty")
        if last and response[-1] != tokenizer.eos_token_id:
            response = [*response, tokenizer.eos_token_id]
        tokens += [*prompt, *response]
        marks += [targets.has_prompt(len(prompt))] * len(prompt) + [targets.has_response(last)] * len(response)
    return Encoded(np.array(tokens, np.int64), np.array(marks, np.uint8))


def plain_turn(prompt: str, response: str, tokenizer: Any) -> Turn:
    """Tokenize a prompt and a response; the tokenizer may put a begin-of-text token before the prompt."""
    encoded = [tokenizer(text)["input_ids"] for text in (prompt, response)]
    begin = tokenizer.bos_token_id
    if begin is not None and all(ids and ids[0] == begin for ids in encoded):
        encoded[1] = encoded[1][1:]
    return Turn(*encoded)


def chat_turns(record: Mapping[str, Any], tokenizer: Any) -> list[Turn]:
    """Write out the messages of a record by the chat template, and cut the text into turns.

    Raises:
        RecordError: The messages are no conversation that ends with the assistant, or the template does not write a
            longer conversation as a shorter one and more.
    """
    messages = _checked_messages(record[MESSAGES_KEY])
    turns, before = [], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _written(messages[:place], tokenizer, add_generation_prompt=True)
        whole = _written(messages[: place + 1], tokenizer)
        if not (prompt.startswith(before) and whole.startswith(prompt)):
            raise RecordError("the chat template changes earlier messages as later ones are added")
        turns.append(Turn(prompt[len(before) :], whole[len(prompt) :]))
        before = whole
    return turns


def truncated(encoded: Encoded, max_tokens: int) -> Encoded:
    """Keep the first ``max_tokens`` tokens.

    Raises:
        RecordError: None of them is to be predicted.
    """
    kept = Encoded(encoded.tokens[:max_tokens], encoded.targets[:max_tokens])
    if not kept.targets[1:].any():
        raise RecordError(f"no token to be predicted among its first {max_tokens}")
    return kept


def _text_at(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Read the text at the one of ``keys`` that the record has."""
    found = [key for key in keys if key in record]
    if len(found) != 1:
        having = f"both {' and '.join(found)}" if found else f"neither {MESSAGES_KEY} nor {' nor '.join(keys)}"
        raise RecordError(f"it has {having}")
    text = record[found[0]]
    if not isinstance(text, str):
        raise RecordError(f"its {found[0]} is no string")
    return text


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise RecordError(f"{MESSAGES_KEY} is no list of at least two")
    before = None
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RecordError(f"message {number} has no content that is a string")
        role = message.get("role")
        if role not in ROLES:
            raise RecordError(f"the role of message {number} is none of {', '.join(ROLES)}")
        if role == before:
            raise RecordError(f"messages {number - 1} and {number} are both of the {role}")
        before = role
    if before != "assistant":
        raise RecordError("the last message is not the assistant's")
    return messages


def _written(messages: list[dict[str, Any]], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=None if tokenizer.chat_template else CHATML,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=DATE,
        )
    except Exception as error:  # a template raises what it likes
        raise RecordError(f"the chat template refuses it: {error}") from error
    assert isinstance(text, str), "tokenize=False"
    return text


def _tokens(turn: Turn, tokenizer: Any) -> Turn:
    """Tokenize text of a chat template, which has written the special tokens, too."""
    return Turn(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in turn))
