"""Fill-in-the-middle: the share and the borders are as asked, every document comes back, and tokenizers are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from moefoundry.config.errors import UserError
from moefoundry.config.schema_data import FimConfig, FimFormat, FimSplit
from moefoundry.data.fim import SPELLINGS, Draws, FillInTheMiddle, Sentinels, restored, with_sentinels
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import Layout
from moefoundry.data.tokenizer import load_tokenizer, train_tokenizer

S = Sentinels(prefix=1000, suffix=1001, middle=1002)
EOS = 0
COUNT = 100_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        ["def first(value):\n    return value + 12345\n", "naïve café, ça va; 你好, 世界 🙂"] * 20, 300
    ).backend


def reordering(backend: Tokenizer | None = None, longest: int = 10**6, **keys: object) -> FillInTheMiddle:
    cfg = FimConfig(**{"rate": 0.1, "format": FimFormat.psm, "split": FimSplit.tokens} | keys)  # type: ignore[arg-type]
    sentinels = S if backend is None else Sentinels.of(backend, "tokenizer")
    return FillInTheMiddle(cfg, sentinels, Draws(17, 3, "code"), longest, backend)


@pytest.mark.parametrize("form", list(FimFormat))
def test_of_100000_documents_the_share_is_as_asked_and_every_one_comes_back(form: FimFormat) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, COUNT).astype(np.int32)
    fim = reordering(format=form)
    planned = fim.lengths(lengths)
    changed = planned != lengths
    assert set((planned - lengths).tolist()) == {0, 3}
    assert abs(changed.mean() - 0.1) < 3 * np.sqrt(0.1 * 0.9 / COUNT)
    stream = rng.integers(1, 1000, lengths.sum()).astype(np.uint16)
    first_suffixes = 0
    for document, tokens in enumerate(np.split(stream, lengths.cumsum()[:-1])):
        tokens[-1] = EOS
        made = fim.apply(document, tokens, int(planned[document]))
        assert (made.dtype, len(made)) == (tokens.dtype, planned[document])
        assert np.array_equal(restored(made, S), tokens)
        if changed[document]:
            assert made[0] == S.prefix
            assert made[-1] == EOS
            first_suffixes += made[1] == S.suffix
        else:
            assert made is tokens
    if form == FimFormat.spm:
        assert first_suffixes == changed.sum()
    share = first_suffixes / changed.sum()
    assert (0.1 < share < 0.4) if form == FimFormat.psm else share > 0.5, "a prefix may be empty"


def test_the_orders_of_the_parts() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, EOS])
    psm, spm = (reordering(rate=1.0, format=each).apply(5, tokens, 13).tolist() for each in ("psm", "spm"))
    hole, end = psm.index(S.suffix), psm.index(S.middle)
    prefix, suffix, middle = psm[1:hole], psm[hole + 1 : end], psm[end + 1 : -1]
    assert prefix + middle + suffix == tokens[:-1].tolist()
    assert all((prefix, middle, suffix)), "another document would show more"
    assert psm == [S.prefix, *prefix, S.suffix, *suffix, S.middle, *middle, EOS]
    assert spm == [S.prefix, S.suffix, *suffix, S.middle, *prefix, *middle, EOS]


def test_it_follows_from_seed_epoch_stream_and_document_alone() -> None:
    every = np.arange(5000)
    numbers = Draws(1, 2, "code").uniform(every, 0)
    assert np.array_equal(Draws(1, 2, "code").uniform(every[::-1], 0)[::-1], numbers)
    assert Draws(1, 2, "code").of(77, 3)[0] == numbers[77]
    for other in (Draws(2, 2, "code"), Draws(1, 3, "code"), Draws(1, 2, "text"), Draws(2, 1, "code")):
        assert abs(np.corrcoef(other.uniform(every, 0), numbers)[0, 1]) < 0.06
    assert abs(np.corrcoef(Draws(1, 2, "code").uniform(every, 1), numbers)[0, 1]) < 0.06
    assert abs(numbers.mean() - 0.5) < 3 * np.sqrt(1 / 12 / len(every))
    assert (numbers.min() >= 0, numbers.max() < 1) == (True, True)


def test_borders_are_even_over_the_document() -> None:
    tokens = np.arange(1, 12)
    tokens[-1] = EOS
    fim = reordering(rate=1.0)
    begins, ends = np.zeros(11), np.zeros(11)
    for document in range(4000):
        made = fim.apply(document, tokens, 14).tolist()
        begin = made.index(S.suffix) - 1
        begins[begin] += 1
        ends[10 - (made.index(S.middle) - made.index(S.suffix) - 1)] += 1
    expected = 4000 / 11
    pairs = begins + ends  # two even draws, one of them sorted to the front
    assert ((pairs / 2 - expected) ** 2 / expected).sum() < 25  # chi-square with 10 degrees: p = 0.005


TEXTS = ["def first(value):\n    return value + 12345\n" * 5, "naïve café, ça va; 你好, 世界 🙂" * 4, "a"]


def test_division_between_characters_keeps_the_text(tokenizer: Tokenizer) -> None:
    fim = reordering(tokenizer, rate=1.0, split=FimSplit.characters)
    sentinels = Sentinels.of(tokenizer, "tokenizer")
    within = 0
    for number in range(300):
        text = TEXTS[number % 3]
        tokens = np.array([*tokenizer.encode(text).ids, EOS], np.uint16)
        (room,) = fim.lengths(np.full(number + 1, len(tokens), np.int32))[-1:].tolist()
        made = fim.apply(number, tokens, room)
        assert len(made) <= room
        back = restored(made, sentinels)
        assert back[-1] == EOS
        assert tokenizer.decode(back[:-1].tolist(), skip_special_tokens=False) == text
        within += not np.array_equal(back, tokens)
    assert within > 50, "borders within tokens change the tokens"


def test_a_document_that_would_not_fit_is_divided_between_tokens(tokenizer: Tokenizer) -> None:
    fim = reordering(tokenizer, rate=1.0, split=FimSplit.characters, longest=20)
    tokens = np.array([*tokenizer.encode(TEXTS[0]).ids, EOS], np.uint16)
    lengths = np.array([len(tokens)], np.int32)
    assert fim.lengths(lengths).tolist() == [len(tokens) + 3], "longer than a row"
    for document in range(20):
        made = fim.apply(document, tokens, len(tokens) + 3)
        assert np.array_equal(restored(made, Sentinels.of(tokenizer, "tokenizer")), tokens)
        tight = fim.apply(document, tokens, len(tokens) + 4)
        assert len(tight) <= len(tokens) + 4
    broken = np.array([tokenizer.encode("🙂").ids[0], *tokens], np.uint16)  # a part of a character
    assert np.array_equal(restored(fim.apply(0, broken, len(broken) + 11), Sentinels.of(tokenizer, "")), broken)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_known_tokenizers(spelling: tuple[str, ...], tokenizer: Tokenizer) -> None:
    other = without_sentinels(tokenizer)
    other.add_special_tokens([AddedToken(name, special=True) for name in spelling])
    sentinels = Sentinels.of(other, "tokenizer")
    assert [sentinels.prefix, sentinels.suffix, sentinels.middle] == [other.token_to_id(name) for name in spelling]


def without_sentinels(tokenizer: Tokenizer) -> Tokenizer:
    text = tokenizer.to_str()
    for name in SPELLINGS[0]:
        text = text.replace(name, name.upper())
    return Tokenizer.from_str(text)


def test_a_tokenizer_without_sentinels_is_named(tokenizer: Tokenizer) -> None:
    other = without_sentinels(tokenizer)
    with pytest.raises(UserError, match=r"^my/tokenizer: the tokenizer has no special tokens for fill-in-the-middle"):
        Sentinels.of(other, Path("my/tokenizer"))
    with pytest.raises(UserError, match=r"^t: the tokenizer has no <b> and no <c> \(the recipe's fim.sentinels\)$"):
        Sentinels.of(other, "t", ["<FIM_BEGIN>", "<b>", "<c>"])
    names = [name.upper() for name in SPELLINGS[0]]
    assert Sentinels.of(other, "t", names) == Sentinels.of(tokenizer, "t")


def test_sentinels_are_added_to_a_tokenizer_that_has_none(tmp_path: Path) -> None:
    given = train_tokenizer(TEXTS * 20, 300)
    assert with_sentinels(given) is given, "it has them"
    text = given.files["tokenizer.json"].decode()
    for name in SPELLINGS[0]:
        text = text.replace(name, name.upper())
    (tmp_path / "tokenizer.json").write_text(text)
    config = '{"eos_token": "<|endoftext|>", "additional_special_tokens": ["<x>"]}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    bare = load_tokenizer(tmp_path)
    made = with_sentinels(bare)
    assert made.vocab_size == bare.vocab_size + 3
    assert made.encode_batch(TEXTS)[0].tolist() == bare.encode_batch(TEXTS)[0].tolist()
    made.save(tmp_path / "made")
    again = load_tokenizer(tmp_path / "made")
    assert (again.sha256, again.eos_id) == (made.sha256, bare.eos_id)
    sentinels = Sentinels.of(again.backend, tmp_path)
    assert [sentinels.prefix, sentinels.suffix, sentinels.middle] == list(range(bare.vocab_size, bare.vocab_size + 3))
    assert again.backend.encode("<fim_hole>").ids != [sentinels.suffix], "what a text spells out is text"
    assert with_sentinels(again) is again
    (tmp_path / "text.txt").write_text("a text\n" * 30)
    options = PrepareOptions(str(tmp_path / "text.txt"), tmp_path / "out", tokenizer=tmp_path, layout=Layout.documents)
    prepare(replace(options, add_fim_tokens=True, val_fraction=0, workers=0))
    assert load_tokenizer(tmp_path / "out" / "tokenizer").sha256 == made.sha256
