"""Byte-level BPE: lossless on any text, and the same in transformers."""

import json
import random
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from moefoundry.config.errors import UserError
from moefoundry.data.tokenizer import (
    SMALLEST_VOCAB,
    SPECIAL_TOKENS,
    TextTokenizer,
    cut_long_runs,
    load_tokenizer,
    train_tokenizer,
)

SAMPLE = [
    "def add(first, second):\n    return first + second\n",
    "class Number:\n    def add(self):\n        pass\n",
] * 8
HARD = [
    " leading and trailing  ",
    "\ttabs\r\n\r\n  mixed \n\n",
    "don't , strip . this !",
    "naïve café 漢字 🙂 \u200d\u0000\u00a0",
    "a <|endoftext|> b <fim_hole>",
    "def add(first,\n        second):\n    return 12345\n",
]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer(SAMPLE, 300)


def test_trained_vocabulary(trained: TextTokenizer) -> None:
    assert trained.vocab_size == 300
    assert [trained.backend.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert (trained.eos_token, trained.eos_id) == ("<|endoftext|>", 0)
    assert train_tokenizer(["x"], 1000).vocab_size == SMALLEST_VOCAB  # nothing to merge


def test_training_is_deterministic(trained: TextTokenizer) -> None:
    assert train_tokenizer(iter(SAMPLE), 300).files == trained.files


@pytest.mark.parametrize("text", HARD)
def test_round_trip_is_lossless(trained: TextTokenizer, text: str) -> None:
    (ids,) = trained.encode_batch([text])
    assert trained.backend.decode(ids.tolist(), skip_special_tokens=False) == text
    assert ids.min() >= len(SPECIAL_TOKENS), "a special token was read out of the text"


def test_every_byte_is_a_token(trained: TextTokenizer) -> None:
    (ids,) = train_tokenizer(["a"], SMALLEST_VOCAB).encode_batch(["漢"])
    assert len(ids) == 3
    assert trained.backend.token_to_id("a") is not None


def test_saved_directory_loads_again(trained: TextTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.files == trained.files
    assert loaded.sha256 == trained.sha256
    assert [ids.tolist() for ids in loaded.encode_batch(HARD)] == [ids.tolist() for ids in trained.encode_batch(HARD)]


def test_transformers_reads_it_alike(trained: TextTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(theirs) == trained.vocab_size
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 1)
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    for text in HARD:
        ids = theirs(text, add_special_tokens=True)["input_ids"]
        assert theirs.decode(ids) == text
    (ours,) = trained.encode_batch([HARD[-1]])
    assert theirs(HARD[-1])["input_ids"] == ours.tolist()
    assert theirs(SPECIAL_TOKENS[2])["input_ids"] == [2]


def test_given_tokenizer_is_used_whole(tmp_path: Path, trained: TextTokenizer) -> None:
    trained.save(tmp_path / "given")
    file = tmp_path / "given" / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(file))
    (tmp_path / "given" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    given = load_tokenizer(tmp_path / "given")
    assert given.eos_id == 1
    assert len(given.encode_batch([SAMPLE[0]])[0]) == len(trained.encode_batch([SAMPLE[0]])[0]) > 4


def test_vocab_size_counts_gaps(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "</s>": 90}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(tmp_path).vocab_size == 91


def test_bad_tokenizers_are_named(tmp_path: Path, trained: TextTokenizer) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    trained.save(tmp_path / "it")
    config = tmp_path / "it" / "tokenizer_config.json"
    (tmp_path / "it" / "special_tokens_map.json").unlink()
    config.write_text("{}")
    with pytest.raises(UserError, match=r"it: the tokenizer has no eos_token"):
        load_tokenizer(tmp_path / "it")
    config.write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"eos_token '</s>' is not in the vocabulary"):
        load_tokenizer(tmp_path / "it")
    config.write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(tmp_path / "it")
    (tmp_path / "it" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path / "it")


def test_vocab_size_must_hold_the_bytes() -> None:
    with pytest.raises(UserError, match="vocab_size=260: at least 261"):
        train_tokenizer(["a"], 260)


@pytest.mark.parametrize("run", ["ACGTTGCA", "\0", " ", "漢字"])
def test_a_run_without_a_break_takes_no_quadratic_time(run: str) -> None:
    chance = random.Random(0)
    times = []
    for length in (20_000, 80_000):
        text = "".join(chance.choice(run) for _ in range(length))
        assert "".join(cut_long_runs(f"before {text}\n after")) == f"before {text}\n after"
        start = time.process_time()
        trained = train_tokenizer([text], 600)
        times.append(time.process_time() - start)
        (ids,) = trained.encode_batch([text])
        assert trained.backend.decode(ids.tolist()) == text
    assert times[1] < 10 * times[0] + 0.2, "four times the text"  # squared it is 16 times


def test_ordinary_text_is_not_cut() -> None:
    for text in (*SAMPLE, *HARD, "", "x" * 255):
        assert cut_long_runs(text) == text
    assert cut_long_runs("x" * 300 + " y" + " " * 600) == ["x" * 256, "x" * 44 + " y" + " " * 256, " " * 256, " " * 88]
