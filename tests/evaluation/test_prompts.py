"""Prompts: one way to read a tokenizer, whatever it declares, and texts that end where any end token says."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moefoundry.config import UserError
from moefoundry.data.tokenizer import train_tokenizer
from moefoundry.evaluation.generation import complete
from moefoundry.evaluation.prompts import PromptTokenizer
from tests.model.tiny import tiny_config, tiny_model

TEXT = "def first(value):\n    return value\n"
LONG = TEXT * 3


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    train_tokenizer([TEXT] * 4, vocab_size=280).save(tmp_path / "plain")
    return tmp_path / "plain"


def metaspace(directory: Path) -> Path:
    """Blanks are part of the pieces, as in SentencePiece's vocabularies, and a decoder drops the first."""
    pieces = ["<unk>", "</s>", "\u2581the", "\u2581cat", "\u2581sat"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return directory


def stream(directory: Path, prompt: str, new_ids: list[int]) -> str:
    tokenizer = PromptTokenizer.open(directory, 500)
    return "".join(tokenizer.decode_stream(tokenizer.encode(prompt), new_ids))


def test_declared_padding_and_truncation_are_not_for_prompts(plain: Path) -> None:
    expected = PromptTokenizer.open(plain, 500).encode(LONG).tolist()
    backend = Tokenizer.from_file(str(plain / "tokenizer.json"))
    backend.enable_padding(length=64, pad_id=1, pad_token="<|pad|>")
    backend.enable_truncation(8)
    backend.save(str(plain / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(plain / "tokenizer.json")).encode(LONG).ids) == 64, "there is something to undo"
    assert PromptTokenizer.open(plain, 500).encode(LONG).tolist() == expected
    assert len(expected) > 8


def test_blanks_between_prompt_and_continuation_are_kept(tmp_path: Path) -> None:
    assert stream(metaspace(tmp_path / "meta"), "the cat", [4, 2, 3]) == " sat the cat"


@pytest.mark.parametrize(
    ("file", "content", "ends"),
    [
        ("generation_config.json", {"eos_token_id": [7, 9]}, {0, 7, 9}),
        ("generation_config.json", {"eos_token_id": 7, "temperature": 0.6}, {0, 7}),
        ("generation_config.json", {"temperature": 0.6}, {0}),
        ("config.json", {"eos_token_id": [0, 8]}, {0, 8}),
        ("special_tokens_map.json", {"eos_token": {"content": "<fim_end>"}}, {0}),
        ("tokenizer_config.json", {"eos_token": {"content": "<fim_end>"}}, {4}),
    ],
)
def test_any_end_token_of_any_file_ends_the_text(plain: Path, file: str, content: dict, ends: set[int]) -> None:
    (plain / file).write_text(json.dumps(content))
    tokenizer = PromptTokenizer.open(plain, 500)
    assert tokenizer.end_ids == ends
    letters = tokenizer.encode("xyz").tolist()
    for end in ends:
        assert stream(plain, "a", [*letters, end, *letters]) == "xyz"


def test_stream_is_the_text_and_never_half_a_character(plain: Path) -> None:
    tokenizer = PromptTokenizer.open(plain, 500)
    prompt, text = tokenizer.encode("def "), "first_\u00e9(value):\n    return '\u65e5\u672c' "
    ids = tokenizer.encode(text).tolist()
    assert any("\ufffd" in tokenizer.backend.decode([token]) for token in ids), "some characters are several tokens"
    pieces = list(tokenizer.decode_stream(prompt, ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    half = tokenizer.encode("a\u65e5").tolist()[:-1]
    assert list(tokenizer.decode_stream(prompt, half)) == ["a", "\ufffd"]


def test_special_tokens_may_be_spelled_out(plain: Path) -> None:
    assert PromptTokenizer.open(plain, 500).encode("<fim_begin>").tolist() == [2]


@pytest.mark.parametrize(("prompt", "message"), [("", "has no token"), ("a\udcff", "not UTF-8")])
def test_what_is_no_prompt_is_refused(plain: Path, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^prompt='.*': {message}$"):
        PromptTokenizer.open(plain, 500).encode(prompt)


def test_a_report_says_what_the_command_says(tmp_path: Path) -> None:
    """Both with blanks, and both up to the second end token."""
    cfg = tiny_config(std=0.3)
    cfg.vocab_size = 5
    directory = metaspace(tmp_path / "meta")
    text = complete(tiny_model(cfg), directory, "the cat", 6)
    words = text.removeprefix("the cat")
    assert words.startswith(" "), text
    ids = {"the": 2, "cat": 3, "sat": 4}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[words.split()[0]]}))
    assert complete(tiny_model(cfg), directory, "the cat", 6) == "the cat"
