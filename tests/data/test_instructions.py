"""Records of instructions have the tokens and targets that LLM Foundry gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefoundry.config.errors import UserError
from moefoundry.data.instructions import (
    Encoded,
    RecordError,
    TargetResponses,
    Targets,
    encode_record,
    load_chat_tokenizer,
    truncated,
)
from moefoundry.data.tokenizer import train_tokenizer
from tests.distributed import run_distributed

CHAT = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And times 3?"},
    {"role": "assistant", "content": "12, as 4 * 3 is 12."},
]
TOOLS = [CHAT[1], {"role": "assistant", "content": "add(2, 2)"}, {"role": "tool", "content": "4"}, CHAT[2]]
RECORDS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 2?\n", "response": "4"},
    {"prompt": "Say nothing in particular: ", "completion": "nothing in particular é <|endoftext|>"},
    {"messages": CHAT},
    {"messages": CHAT[1:3]},
    {"messages": TOOLS},
]
TARGETS = [
    Targets(),
    Targets(TargetResponses.all),
    Targets(TargetResponses.all, "all"),
    Targets(TargetResponses.last, "length>=20"),
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<fim_end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Without a chat template; with one; and one that puts a begin-of-text token before every text."""
    root = tmp_path_factory.mktemp("tokenizers")
    trained = train_tokenizer([json.dumps(RECORDS, ensure_ascii=False)], 300)
    names = ("plain", "template", "begins")
    for name in names:
        trained.save(root / name)
    config = json.loads(trained.files["tokenizer_config.json"])
    (root / "template/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    begins = json.loads(trained.files["tokenizer.json"])
    begin = {"id": "<fim_begin>", "ids": [2], "tokens": ["<fim_begin>"]}
    begins["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<fim_begin>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<fim_begin>": begin},
    }
    (root / "begins/tokenizer.json").write_text(json.dumps(begins))
    (root / "begins/tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<fim_begin>"}))
    return {name: root / name for name in names}


def by_llm_foundry(directories: dict[str, Path]) -> dict[str, list[list[tuple[list[int], list[int]]]]]:
    """Tokens and labels of each record, for each of the targets."""
    from llmfoundry.data.finetuning.collator import stitch_turns_decoder_only
    from llmfoundry.data.finetuning.tasks import tokenize_formatted_example
    from transformers import AutoTokenizer

    found = {}
    for name, directory in directories.items():
        tokenizer = AutoTokenizer.from_pretrained(directory)
        turns = [tokenize_formatted_example(record, tokenizer)["turns"] for record in RECORDS]
        found[name] = [
            [
                stitch_turns_decoder_only(each, targets.prompts, targets.responses, tokenizer.eos_token_id, True)
                for each in turns
            ]
            for targets in TARGETS
        ]
    return found


def test_tokens_and_targets_are_those_of_llm_foundry(tokenizers: dict[str, Path]) -> None:
    expected = run_distributed(by_llm_foundry, 1, tokenizers)[0]
    for name, directory in tokenizers.items():
        tokenizer = load_chat_tokenizer(directory)
        for targets, of_targets in zip(TARGETS, expected[name], strict=True):
            for record, (tokens, labels) in zip(RECORDS, of_targets, strict=True):
                encoded = encode_record(record, tokenizer, targets)
                assert encoded.tokens.tolist() == tokens
                assert np.where(encoded.targets, encoded.tokens, -100).tolist() == labels


def predicted(encoded: Encoded, tokenizer: Any) -> str:
    text: str = tokenizer.decode(encoded.tokens[encoded.targets.astype(bool)], clean_up_tokenization_spaces=False)
    return text


def test_targets_by_hand(tokenizers: dict[str, Path]) -> None:
    tokenizer = load_chat_tokenizer(tokenizers["template"])
    encoded = encode_record({"messages": CHAT, "id": 7}, tokenizer, Targets())
    written = "".join(f"[{m['role']}]{m['content']}<fim_end>" for m in CHAT)
    assert tokenizer.decode(encoded.tokens) == f"<|endoftext|>{written}<|endoftext|>"
    assert predicted(encoded, tokenizer) == f"{CHAT[4]['content']}<fim_end><|endoftext|>"
    every = encode_record({"messages": CHAT}, tokenizer, Targets(TargetResponses.all))
    assert predicted(every, tokenizer) == f"4<fim_end>{CHAT[4]['content']}<fim_end><|endoftext|>"
    assert encoded.tokens.dtype == np.int64
    assert encoded.targets.dtype == np.uint8


def test_a_long_record_is_cut(tokenizers: dict[str, Path]) -> None:
    tokenizer = load_chat_tokenizer(tokenizers["plain"])
    encoded = encode_record(RECORDS[0], tokenizer, Targets())
    prompt = int(encoded.targets.argmax())
    kept = truncated(encoded, prompt + 1)
    assert kept.tokens.tolist() == encoded.tokens[: prompt + 1].tolist()
    assert kept.targets.tolist() == [0] * prompt + [1]
    with pytest.raises(RecordError, match=f"^no token to be predicted among its first {prompt}$"):
        truncated(encoded, prompt)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "it is no mapping"),
        ({"text": "a"}, "it has neither messages nor prompt"),
        ({"prompt": "a"}, "it has neither messages nor response nor completion"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "it has both response and completion"),
        ({"prompt": "a", "response": 4}, "its response is no string"),
        ({"prompt": "a", "response": ""}, "the response of turn 1 is empty"),
        ({"prompt": "", "response": "b"}, "the prompt of turn 1 is empty"),
        ({"messages": "a"}, "messages is no list of at least two"),
        ({"messages": [ANSWER]}, "messages is no list of at least two"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no content that is a string"),
        ({"messages": [USER, ANSWER | {"role": "robot"}]}, "the role of message 2 is none of system, user"),
        ({"messages": [USER, USER, ANSWER]}, "messages 1 and 2 are both of the user"),
        ({"messages": [USER, ANSWER, USER]}, "the last message is not the assistant's"),
    ],
)
def test_a_bad_record_is_named(tokenizers: dict[str, Path], record: object, message: str) -> None:
    with pytest.raises(RecordError, match=f"^{message}"):
        encode_record(record, load_chat_tokenizer(tokenizers["plain"]), Targets())


def test_templates_that_refuse_or_rewrite(tokenizers: dict[str, Path]) -> None:
    tokenizer = load_chat_tokenizer(tokenizers["template"])
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(RecordError, match=r"^the chat template refuses it: no system messages$"):
        encode_record({"messages": CHAT}, tokenizer, Targets())
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(RecordError, match=r"^the chat template changes earlier messages as later ones are added$"):
        encode_record({"messages": CHAT}, tokenizer, Targets())


@pytest.mark.parametrize("prompts", ["some", "length>=", "length>=0", "length>=x", "7"])
def test_bad_targets_are_refused(prompts: str) -> None:
    with pytest.raises(UserError, match=rf"^target_prompts={prompts}: none, all, or length>=N"):
        Targets(prompts=prompts)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a tokenizer that transformers opens"):
        load_chat_tokenizer(tmp_path)
