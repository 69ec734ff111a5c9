"""Tokens by pieces are those of the tokenizers library, whatever the text and however the tokenizer cuts it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from moefoundry.data.patterns import translated
from moefoundry.data.pieces import WORDS, PieceEncoder
from moefoundry.data.tokenizer import TextTokenizer, train_tokenizer

TEXTS = [
    "def total(values):\n\treturn sum(v for v in values)  # it's 1234567 of 89\n\n\n    x = {'a': [1, 2]}\r\n\r\n  ",
    "Ünïcödé naïve café — “quoted” … 漢字かな交じり文 한국어 Ελλά عربى हिन्दी ๑๒๓ ½ x² Ⅷ\u00a0\u2003\u3000end",
    "emoji \U0001f600\U0001f469\u200d\U0001f467 and \U0001d538\U0001d7d9 and \U00020000, combining e\u0301 a\u0308",
    "joiner\u200d, mark\ufeff, \ufffd, control \x1c\x1f\x7f\x85 \x00",
    "We'RE I'M don't '\u017f 'S a'\u017f İstanbul ẞ \ufb01  trailing   \n \n  \t\t mixed\u2028line\u2029ends",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SCHEMES = {"gpt2": None, "llama3": (LLAMA3,), "o200k": (O200K,), "deepseek": DEEPSEEK, "some": (r"\p{Lu}\p{Ll}+|\d",)}


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer([*TEXTS, *TEXTS[:1] * 20], 600)


def cutting(trained: TextTokenizer, patterns: tuple[str, ...] | None, **changes: Any) -> Tokenizer:
    """The tokenizer with other steps before its model."""
    backend = Tokenizer.from_str(trained.backend.to_str())
    if patterns is not None:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    for name, value in changes.items():
        setattr(backend, name, value)
    backend.encode_special_tokens = True
    return backend


def by_pieces(backend: Tokenizer) -> PieceEncoder | None:
    return PieceEncoder.of(backend, json.loads(backend.to_str()))


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts of characters from everywhere, and of parts of real ones."""
    rng = random.Random(seed)
    whole = "".join(TEXTS)
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 30)):
            start = rng.randrange(len(whole))
            parts.append(whole[start : start + rng.randrange(1, 9)])
            parts.append(rng.choice(["", " ", "\n", "'", chr(rng.randrange(0x20, 0xD800))]))
        yield "".join(parts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_are_the_librarys(trained: TextTokenizer, scheme: str) -> None:
    backend = cutting(trained, SCHEMES[scheme])
    encoder = by_pieces(backend)
    assert encoder is not None
    behind = (7).to_bytes(4, sys.byteorder)
    kept = 0
    for text in [*TEXTS, *texts(400), "", " ", "\n"]:
        tokens = encoder.encode(text, behind)
        assert tokens is not None or not text.isascii()
        if tokens is not None:
            kept += 1
            assert tokens.tolist() == [*backend.encode(text, add_special_tokens=False).ids, 7], repr(text)
    assert kept > 200, "most characters are cut alike"


def test_what_the_library_must_do_is_left_to_it(trained: TextTokenizer) -> None:
    assert by_pieces(cutting(trained, None, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert by_pieces(cutting(trained, None, pre_tokenizer=pre_tokenizers.Whitespace())) is None
    assert by_pieces(cutting(trained, None, normalizer=normalizers.Lowercase())) is None
    assert by_pieces(cutting(trained, (r"(?<=a)b|.",))) is None
    composed = by_pieces(cutting(trained, None, normalizer=normalizers.NFC()))
    assert composed is not None
    assert composed.encode("e\u0301", b"") is None
    assert composed.encode("plain", b"") is not None
    backend = cutting(trained, None)
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|x|>", special=True)])
    encoder = by_pieces(backend)
    assert encoder is not None
    assert encoder.encode("a <tool> b", b"") is None
    text = "a <|x|> <|endoftext|> b"
    assert encoder.encode(text, b"").tolist() == backend.encode(text).ids  # type: ignore[union-attr]


def test_a_batch_mixes_both(trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "\U0001d538 is a letter beyond those that patterns are translated for"
    found = [trained.encode_batch([*TEXTS, odd, "", *TEXTS], ended=True) for _ in range(2)]
    monkeypatch.setattr("moefoundry.data.tokenizer.available_cores", lambda: 64)
    found.append(trained.encode_batch([*TEXTS, odd, "", *TEXTS], ended=True))
    expected = [
        [*encoding.ids, trained.eos_id]
        for encoding in trained.backend.encode_batch([*TEXTS, odd, "", *TEXTS], add_special_tokens=False)
    ]
    assert [[tokens.tolist() for tokens in each] for each in found] == [expected] * 3


@pytest.mark.parametrize(
    "pattern", ["(a)", "[a&&b]", "a^", "[[a]b]", r"\bword", "[]a]", r"\P{L}[\S]", r"\p{Han}", "(?<!a)b"]
)
def test_patterns_that_may_mean_something_else_are_not_translated(pattern: str) -> None:
    assert translated(pattern, 128) is None


def test_translated_patterns_cut_by_category() -> None:
    pattern = translated(WORDS, 0x10000)
    assert pattern is not None
    assert pattern.findall("it's naïve: Δx²=漢 \x1c1\n\n y") == [
        "it", "'s", " naïve", ":", " Δx", "²", "=", "漢", " \x1c", "1", "\n\n", " y"
    ]  # fmt: skip
