"""Infilling: prompts as training had them, gaps from held-out texts, and scores that follow their definitions."""

import numpy as np
import pytest
import torch

from moefoundry.config import UserError
from moefoundry.config.schema_data import FimConfig
from moefoundry.data.fim import Draws, FillInTheMiddle, Sentinels
from moefoundry.data.tokenizer import train_tokenizer
from moefoundry.evaluation.infilling import Gap, Infiller, edit_similarity, evaluate_infilling, lines_taken_out
from moefoundry.evaluation.prompts import PromptTokenizer

TEXT = "def total(values):\n    result = sum(values)\n    return result\n"
FIM = "train_loader.dataset.fim"


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(train_tokenizer([TEXT] * 9, 300).backend)


@pytest.mark.parametrize("form", ["psm", "spm"])
def test_a_prompt_and_its_middle_are_a_document_as_training_has_it(tokenizer: PromptTokenizer, form: str) -> None:
    backend = tokenizer.backend
    infiller = Infiller(tokenizer, "here", {f"{FIM}.format": form})
    words = np.array([*backend.encode(TEXT).ids, 0])
    cfg = FimConfig(rate=1.0, format=form)  # type: ignore[arg-type]
    fim = FillInTheMiddle(cfg, Sentinels.of(backend, "here"), Draws(0, 0), 10**6)
    for document in range(20):
        made = fim.apply(document, words, len(words) + 3)
        hole, end = (
            int(np.flatnonzero(made == each)[0]) for each in (infiller.sentinels.suffix, infiller.sentinels.middle)
        )
        suffix = backend.decode(made[hole + 1 : end].tolist())
        behind = backend.decode(made[end + 1 : -1].tolist())
        assert TEXT.endswith(suffix)
        prefix = backend.decode(made[1:hole].tolist()) if form == "psm" else behind[: len(behind) // 2]
        prompt = infiller.prompt(prefix, suffix).tolist()
        if form == "psm":
            assert backend.decode(prompt, skip_special_tokens=False) == backend.decode(
                made[: end + 1].tolist(), skip_special_tokens=False
            )
        else:
            names = backend.decode(made[:2].tolist(), skip_special_tokens=False)
            assert backend.decode(prompt, skip_special_tokens=False) == f"{names}{suffix}<fim_end>{prefix}"


def test_special_tokens_in_the_text_are_text(tokenizer: PromptTokenizer) -> None:
    infiller = Infiller(tokenizer, "here")
    ids = infiller.prompt("<fim_hole>", "")
    assert ids.dtype == torch.int64
    assert (ids == infiller.sentinels.suffix).sum() == 1
    assert tokenizer.backend.encode_special_tokens, "as it was"
    with pytest.raises(UserError, match=r"suffix='.*udcff': not UTF-8"):
        infiller.prompt("", "\udcff")
    with pytest.raises(UserError, match=r"^here: the tokenizer has no <a> and no <b> and no <c>"):
        Infiller(tokenizer, "here", {f"{FIM}.sentinels": ["<a>", "<b>", "<c>"]})


def test_a_line_is_taken_out_of_each_text() -> None:
    texts = [TEXT * number for number in range(1, 200)] + ["one\ntwo\n", ""]
    gaps = list(lines_taken_out(texts))
    assert len(gaps) == 199
    for gap, text in zip(gaps, texts, strict=False):
        assert gap.prefix + gap.middle + gap.suffix == text
        assert gap.middle in ("def total(values):", "result = sum(values)", "return result")
        assert gap.suffix.startswith("\n")
        assert gap.prefix.strip()
    assert len({gap.middle for gap in gaps}) == 3
    assert gaps == list(lines_taken_out(texts))
    assert gaps != list(lines_taken_out(texts, seed=1))


def test_scores() -> None:
    gaps = [Gap("a\n", "b = 1", "\nc\n"), Gap("x\n", "return y", "\nz\n")]
    perfect = evaluate_infilling(gaps, lambda prefix, suffix: {"a\n": "b = 1\nmore", "x\n": "\n  return y"}[prefix])
    assert (perfect.exact_match, perfect.edit_similarity) == (1.0, 1.0)
    assert perfect.completions == ["b = 1\nmore", "\n  return y"]
    near = evaluate_infilling(gaps, lambda prefix, suffix: "b = 2")
    assert near.exact_match == 0
    assert near.edit_similarity == pytest.approx((4 / 5 + edit_similarity("b = 2", "return y")) / 2)
    with pytest.raises(UserError, match="no text has three lines"):
        evaluate_infilling([], lambda prefix, suffix: "")


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("", "abc", 3),
        ("same", "same", 0),
        ("ab", "cd", 2),
        ("a", "abcd", 3),
    ],
)
def test_edit_similarity_is_levenshteins(first: str, second: str, distance: int) -> None:
    expected = 1 - distance / max(len(first), len(second))
    assert edit_similarity(first, second) == edit_similarity(second, first) == pytest.approx(expected)
