"""Preference data: a record with a prompt and two responses becomes two documents, the chosen response first.

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}    prompt may be left out

In the second form a conversation is the prompt's messages and those of the response, or those of the response alone;
its last message is the assistant's, and alone is to be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moefoundry.data.instructions import MESSAGES_KEY, Encoded, RecordError, Targets, encode_record

SIDES = ("chosen", "rejected")


def encode_preference(record: object, tokenizer: Any) -> tuple[Encoded, Encoded]:
    """Encode the chosen and the rejected response of a record, each with the prompt.

    Args:
        record: A mapping in one of the formats; keys of other names are ignored.
        tokenizer: From :func:`~moefoundry.data.instructions.load_chat_tokenizer`.

    Raises:
        RecordError: The record is in none of the formats, or its responses are the same.
    """
    if not isinstance(record, Mapping):
        raise RecordError("it is no mapping")
    chosen, rejected = (encode_record(_conversation(record, side), tokenizer, Targets()) for side in SIDES)
    if chosen.tokens.tolist() == rejected.tokens.tolist():
        raise RecordError("its chosen and rejected responses are the same")
    return chosen, rejected


def _conversation(record: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Write one side of a record as a record of instructions."""
    if side not in record:
        raise RecordError(f"it has no {side}")
    prompt, response = record.get("prompt"), record[side]
    if isinstance(prompt, str) and isinstance(response, str):
        return {"prompt": prompt, "response": response}
    if isinstance(response, list) and (prompt is None or isinstance(prompt, list)):
        return {MESSAGES_KEY: [*(prompt or []), *response]}
    raise RecordError(f"its prompt and {side} are not both strings, nor both lists of messages")
