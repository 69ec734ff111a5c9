"""Records of preferences become two documents, each as instruction data have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moefoundry.data.instructions import RecordError, Targets, encode_record, load_chat_tokenizer
from moefoundry.data.preferences import encode_preference
from moefoundry.data.tokenizer import train_tokenizer

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizers") / "trained"
    train_tokenizer(["What is 2 + 2? 4, not 5."], 262).save(directory)
    return load_chat_tokenizer(Path(directory))


@pytest.mark.parametrize(
    ("record", "sides"),
    [
        (
            {"prompt": "2+2? ", "chosen": "4", "rejected": "5", "score": 3},
            [{"prompt": "2+2? ", "response": answer} for answer in "45"],
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            [{"messages": [USER, answer]} for answer in (GOOD, BAD)],
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [{"messages": [USER, answer]} for answer in (GOOD, BAD)]),
    ],
)
def test_each_side_is_a_record_of_instructions(tokenizer: Any, record: dict, sides: list[dict]) -> None:
    for found, side in zip(encode_preference(record, tokenizer), sides, strict=True):
        expected = encode_record(side, tokenizer, Targets())
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.targets.tolist() == expected.targets.tolist()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], "it is no mapping"),
        ({"prompt": "a", "chosen": "b"}, "it has no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "its chosen and rejected responses are the same"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": "b"}, "its prompt and chosen are not both strings, nor"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "messages 1 and 2 are both of the user"),
        ({"chosen": "b", "rejected": "c"}, "its prompt and chosen are not both strings"),
    ],
)
def test_a_bad_record_is_named(tokenizer: Any, record: object, message: str) -> None:
    with pytest.raises(RecordError, match=f"^{message}"):
        encode_preference(record, tokenizer)
