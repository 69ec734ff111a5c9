"""Infilling: prompts as training had them, gaps from held-out texts, and scores that follow their definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moefoundry.config import UserError
from moefoundry.config.schema_data import FimConfig
from moefoundry.config.tasks import read_tasks
from moefoundry.data.fim import Draws, FillInTheMiddle, Sentinels
from moefoundry.data.tokenizer import train_tokenizer
from moefoundry.evaluation.infilling import FIM, Gap, Infiller, edit_similarity, lines_taken_out
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.evaluation.tasks.infilling import _judged
from moefoundry.evaluation.tasks.run import Results, Sizes, evaluate_tasks, load_tasks
from moefoundry.pretrained import from_pretrained
from tests.evaluation.tiny_tasks import Trained, gaps, write_lines

TEXT = "def total(values):\n    result = sum(values)\n    return result\n"


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


def test_a_prompt_keeps_what_is_nearest_to_the_gap(tokenizer: PromptTokenizer) -> None:
    infiller = Infiller(tokenizer, "here")
    s, ids = infiller.sentinels, {text: infiller.ids("text", text) for text in ("a" * 9, "b" * 9, "bb")}
    left, right, short = ids.values()
    assert infiller.prompt("a" * 9, "b" * 9, 99).tolist() == infiller.prompt("a" * 9, "b" * 9).tolist()
    for room in range(3, 3 + len(left) + len(right)):
        kept = infiller.prompt("a" * 9, "b" * 9, room).tolist()
        assert len(kept) == room
        hole, end = kept.index(s.suffix), kept.index(s.middle)
        assert kept == [s.prefix, *left[len(left) - hole + 1 :], s.suffix, *right[: end - hole - 1], s.middle]
        assert abs((hole - 1) - (end - hole - 1)) <= 1
    assert infiller.prompt("a" * 9, "bb", 8).tolist().count(short[0]) == len(short)
    with pytest.raises(UserError, match="no room for the special tokens"):
        infiller.prompt("a", "b", 2)


def results_of(trained: Trained, examples: list[dict[str, str]], path: Path, **task: object) -> Results:
    model = from_pretrained(trained.checkpoint)
    recipe = task.pop("recipe", None)
    keys = {"label": "gaps", "icl_task_type": "infilling", "num_fewshot": [0]}
    tasks = load_tasks(read_tasks([{**keys, "dataset_uri": str(write_lines(path, examples)), **task}]))
    tokenizer = PromptTokenizer.of_checkpoint(trained.checkpoint)
    return evaluate_tasks(model, tokenizer, tasks, Sizes(3, 256), recipe=recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["psm", "spm"])
def test_the_task_scores_and_fills_each_gap(trained: Trained, tmp_path: Path, form: str) -> None:
    """Log-probabilities and greedy tokens are those of one forward pass after the other, without padding or cache."""
    results = results_of(trained, gaps(), tmp_path / "gaps.jsonl", recipe={f"{FIM}.format": form})
    model, tokenizer = from_pretrained(trained.checkpoint), PromptTokenizer.of_checkpoint(trained.checkpoint)
    infiller = Infiller(tokenizer, "here", {f"{FIM}.format": form})
    samples = results.samples["gaps/0-shot"]
    taken_out = [next(lines_taken_out([each["text"]])) for each in gaps()[3:]]
    expected = [Gap(each["prefix"], each["middle"], each["suffix"]) for each in gaps()[:3]] + taken_out
    longest = max(len(infiller.ids("middle", gap.middle)) for gap in expected)
    for sample, gap in zip(samples, expected, strict=True):
        prompt, middle = infiller.prompt(gap.prefix, gap.suffix), torch.tensor(infiller.ids("middle", gap.middle))
        with torch.no_grad():
            logits = model(torch.cat([prompt, middle])[None])[0].float().log_softmax(-1)
            logprob = logits[len(prompt) - 1 : -1].gather(1, middle[:, None]).sum().item()
            ids = prompt
            while len(ids) < len(prompt) + longest + 1 and (
                len(ids) == len(prompt) or ids[-1] not in tokenizer.end_ids
            ):
                ids = torch.cat([ids, model(ids[None])[0, -1].argmax()[None]])
        assert (sample["logprob"], sample["tokens"]) == (pytest.approx(logprob, abs=1e-3), len(middle))
        assert sample["middle"] == gap.middle
        whole = tokenizer.text_after(prompt.tolist(), ids[len(prompt) :].tolist())
        assert whole.startswith(sample["generated"])
        assert whole == sample["generated"] or "\n" in sample["generated"].lstrip("\n")
    metrics = {name.rpartition("/")[2]: value for name, value in results.metrics.items()}
    assert metrics == {
        "InfillingExactMatchAccuracy": sum(each["correct"] for each in samples) / len(samples),
        "InfillingEditSimilarity": pytest.approx(sum(each["similarity"] for each in samples) / len(samples)),
        "InfillingMiddleCrossEntropy": pytest.approx(
            -sum(each["logprob"] for each in samples) / sum(each["tokens"] for each in samples)
        ),
    }


def test_texts_are_judged_by_a_line_or_as_a_whole() -> None:
    assert _judged("b = 1\nmore", "b = 1") == {"answer": "b = 1", "correct": True, "similarity": 1.0}
    assert _judged("\n  return y", "  return y\n")["correct"]
    assert not _judged("one\ntwo", "one\ntwo\nthree")["correct"]
    assert _judged("one\ntwo\n", "\n one\ntwo")["correct"]
    near = _judged("b = 2", "b = 1")
    assert (near["correct"], near["similarity"]) == (False, 4 / 5)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "one\ntwo"}, r"gaps/0-shot: example 2: text: fewer than three lines"),
        ({"prefix": "a", "middle": "", "suffix": "b"}, r"gaps/0-shot: example 2: middle: has no token"),
        ({"prefix": "a", "suffix": "b"}, r"gaps/0-shot: example 2: middle: absent among prefix, suffix"),
        ({"prefix": "a", "middle": "x" * 300, "suffix": "b"}, r"no room for the special tokens of a prompt"),
    ],
)
def test_examples_that_are_no_gaps(trained: Trained, tmp_path: Path, example: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        results_of(trained, [gaps()[0], example], tmp_path / "gaps.jsonl")


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
