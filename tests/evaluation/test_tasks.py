"""In-context tasks: LLM Foundry's own data sets and metrics give the same, example for example."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext as does_not_raise
from pathlib import Path
from typing import Any

import pytest
import torch

from moefoundry.config import ConfigError, Recipe, UserError
from moefoundry.config.tasks import read_gauntlet, read_tasks
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.evaluation.tasks.gauntlet import gauntlet_scores, left_out
from moefoundry.evaluation.tasks.run import (
    Results,
    Sizes,
    check_tasks,
    evaluate_tasks,
    load_tasks,
    say_what_is_left_out,
)
from moefoundry.pretrained import from_pretrained
from tests.distributed import run_distributed
from tests.evaluation.tiny_tasks import Trained, definitions, eval_data, gaps, problems, write_lines

LENGTH = 256
MC, ECE = "InContextLearningMultipleChoiceAccuracy", "InContextLearningMCExpectedCalibrationError"
LM, LM_ECE = "InContextLearningLMAccuracy", "InContextLearningLMExpectedCalibrationError"
EXACT = "InContextLearningGenerationExactMatchAccuracy"
Task = dict[str, Any]


@pytest.fixture(scope="module")
def their_model(trained: Trained) -> Any:
    """The exported model and its tokenizer, as LLM Foundry's evaluation has them."""
    from composer.models import HuggingFaceModel
    from llmfoundry.eval import metrics
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = {name: getattr(metrics, name)() for name in (MC, ECE, LM, LM_ECE, EXACT)}
    return HuggingFaceModel(
        AutoModelForCausalLM.from_pretrained(trained.hf).eval(),
        AutoTokenizer.from_pretrained(trained.hf),
        metrics=list(known.values()),
    )


@torch.no_grad()
def theirs(model: Any, task: Task, scratch: Path) -> tuple[dict[str, float], list[int]]:
    """LLM Foundry's metrics of a task, and which examples it finds right."""
    from llmfoundry.utils.builders import build_icl_evaluators

    task = {"metric_names": [MC, ECE], **task}
    (evaluator,), _ = build_icl_evaluators([copy.deepcopy(task)], model.tokenizer, LENGTH, 8, str(scratch))
    metrics = {name: copy.deepcopy(model.get_metrics(is_train=False)[name]) for name in task["metric_names"]}
    right: list[int] = []
    for batch in evaluator.dataloader.dataloader:
        outputs = model.eval_forward(batch)
        for metric in metrics.values():
            right += model.update_metric(batch, outputs, metric).get("result", [])
    return {name: metric.compute().item() for name, metric in metrics.items()}, right


@pytest.fixture(scope="module")
def evaluate(trained: Trained) -> Callable[..., Results]:
    """``evaluate(task, batch_size=..., limit=...)``: our results of one task."""
    model = from_pretrained(trained.hf)
    tokenizer = PromptTokenizer.open(trained.hf, model.cfg.vocab_size)

    def results(task: Task, batch_size: int = 4, limit: int | None = None) -> Results:
        return evaluate_tasks(model, tokenizer, load_tasks(read_tasks([task])), Sizes(batch_size, LENGTH, limit))

    return results


def cases() -> Iterator[Any]:
    own, plain = {"dataset_uri": "own"}, {"strip_dataset": False, "continuation_delimiter": ""}
    choice = {**own, "icl_task_type": "multiple_choice"}
    yield pytest.param({**choice, "num_fewshot": [0]}, id="choice")
    texts = {"prompt_string": "Code.\n", "example_delimiter": "\n\n", "continuation_delimiter": "\n   "}
    yield pytest.param({**choice, "num_fewshot": [3], **texts, "question_prelimiter": "# "}, id="choice-few-shot")
    yield pytest.param({**choice, "num_fewshot": [23], "fewshot_random_seed": 7}, id="choice-all-the-others")
    yield pytest.param({**choice, "num_fewshot": [5], "max_seq_len": 40}, id="choice-cut")
    yield pytest.param({**choice, "num_fewshot": [1], **plain}, id="choice-blanks-kept")
    schema = {**own, "icl_task_type": "schema"}
    yield pytest.param({**schema, "num_fewshot": [0], "prelimiter": "# "}, id="schema")
    yield pytest.param({**schema, "num_fewshot": [2], "continuation_delimiter": "    "}, id="schema-few-shot")
    modeling = {**own, "icl_task_type": "language_modeling", "metric_names": [LM, LM_ECE]}
    yield pytest.param({**modeling, "num_fewshot": [0], **plain}, id="modeling")
    yield pytest.param({**modeling, "num_fewshot": [2], **plain, "example_delimiter": "\n\n"}, id="modeling-few-shot")
    answers = {**own, "icl_task_type": "generation_task_with_answers", "metric_names": [EXACT]}
    stops = {"early_stopping_criteria": ["\n\n", "#"], "continuation_delimiter": "\n   "}
    yield pytest.param({**answers, "num_fewshot": [0], **stops}, id="answers")
    yield pytest.param({**answers, "num_fewshot": [2], "do_normalization": False, **stops}, id="answers-as-they-are")
    long = {"generation_kwargs": {"max_new_tokens": 24}}
    yield pytest.param(
        {**answers, "num_fewshot": [1], "cot_delimiter": "return", **stops, **long}, id="answers-thought"
    )
    for name, number in (("copa", 0), ("copa", 2)):
        task = {"dataset_uri": f"{name}.jsonl", "icl_task_type": "multiple_choice", "num_fewshot": [number]}
        yield pytest.param(task, id=f"copa-{number}")
    arc = {"dataset_uri": "arc_easy.jsonl", "icl_task_type": "multiple_choice", "num_fewshot": [1]}
    yield pytest.param({**arc, "continuation_delimiter": "\nAnswer: "}, id="arc-easy")
    yield pytest.param({**modeling, "dataset_uri": "lambada_openai_small.jsonl", "num_fewshot": [0]}, id="lambada")


@pytest.mark.parametrize("task", cases())
def test_scores_equal_llm_foundrys(
    task: Task, their_model: Any, evaluate: Callable[..., Results], tmp_path: Path
) -> None:
    own = task["dataset_uri"] == "own"
    if own:
        path = write_lines(tmp_path / "examples.jsonl", definitions(24))
    else:
        path = tmp_path / task["dataset_uri"]
        path.write_text("".join(eval_data(path.name).read_text().splitlines(keepends=True)[:24]))
    task = {"metric_names": [MC, ECE], **task, "label": "task", "dataset_uri": str(path)}
    expected, right = theirs(their_model, task, tmp_path)
    assert len(right) == (24 if own else len(path.read_text().splitlines()))
    results = evaluate(task)
    label = f"task/{task['num_fewshot'][0]}-shot"
    assert [int(sample["correct"]) for sample in results.samples[label]] == right
    for name, value in expected.items():
        assert results.metrics[f"metrics/{label}/{name}"] == pytest.approx(value, abs=1e-6), name
    if own:
        assert 0 < sum(right) < len(right), "a model that is always right, or never, would tell little"


def same_samples(samples: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every text and choice the same, and numbers to 1e-4."""
    assert samples.keys() == expected.keys()
    for label, rows in samples.items():
        for row, other in zip(rows, expected[label], strict=True):
            assert _close(row, other), (label, row, other)


def _close(value: Any, other: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_close(value[name], other[name]) for name in value)
    if isinstance(value, list):
        return len(value) == len(other) and all(map(_close, value, other))
    return abs(value - other) < 1e-4 if isinstance(value, float) else bool(value == other)


def on_mesh(checkpoint: str, tasks: Path, expert: int, batch_size: int) -> Results:
    from moefoundry.config import MeshConfig
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.pretrained import evaluated_at

    meshes = build_meshes(resolve_degrees(MeshConfig(expert=expert), 2), "cpu")
    with evaluated_at(checkpoint, meshes=meshes, device=torch.device("cpu")) as evaluated:
        loaded = load_tasks(read_tasks(str(tasks)))
        return evaluate_tasks(evaluated.model, evaluated.tokenizer, loaded, Sizes(batch_size, LENGTH))


@pytest.mark.parametrize(("expert", "batch_size"), [(1, 4), (2, 7)])
def test_ranks_and_batches_change_nothing(trained: Trained, alone: Results, expert: int, batch_size: int) -> None:
    ranks = run_distributed(on_mesh, 2, str(trained.checkpoint), trained.tasks, expert, batch_size)
    for results in ranks:
        assert results.metrics == pytest.approx(alone.metrics, rel=1e-6)
        same_samples(results.samples, alone.samples)


@pytest.fixture(scope="module")
def alone(trained: Trained) -> Results:
    """All tasks, one example at a time."""
    model = from_pretrained(trained.checkpoint)
    tokenizer = PromptTokenizer.of_checkpoint(trained.checkpoint)
    return evaluate_tasks(model, tokenizer, load_tasks(read_tasks(str(trained.tasks))), Sizes(1, LENGTH))


def test_training_evaluates_its_tasks(trained: Trained, alone: Results) -> None:
    line = trained.run.metrics[-1]
    assert {name: line[name] for name in alone.metrics} == pytest.approx(alone.metrics, rel=1e-6)
    assert [line["batch"] for line in trained.run.metrics if "metrics/choose/0-shot/" + MC in line] == [20, 40]
    gauntlet = (alone.metrics[f"metrics/choose/0-shot/{MC}"] - 0.5) / 0.5
    assert line["icl/metrics/eval_gauntlet/easy"] == line["icl/metrics/eval_gauntlet/default_average"] == gauntlet
    kept = [json.loads(text) for text in (trained.run.run_dir / "evaluation" / "ba40.jsonl").open()]
    assert len(kept) == sum(map(len, alone.samples.values()))
    same_samples(
        {"code": [each for each in kept if each.pop("task") == "code/0-shot" and each.pop("example") >= 0]},
        {"code": alone.samples["code/0-shot"]},
    )
    assert "task             code/0-shot/pass@1 0.5000" in trained.run.out
    assert (trained.run.run_dir / "tasks.png").stat().st_size > 1000


@pytest.mark.parametrize("weighting", ["EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ"])
@pytest.mark.parametrize(("subtract", "rescale"), [(False, False), (True, False), (True, True)])
def test_averages_equal_llm_foundrys(weighting: str, subtract: bool, rescale: bool) -> None:
    from types import SimpleNamespace

    from llmfoundry.callbacks import EvalGauntlet

    def benchmark(name: str, number: int, chance: float) -> Task:
        return {"name": name, "num_fewshot": number, "random_baseline": chance}

    categories = [
        {"name": "world", "benchmarks": [benchmark("a", 0, 0.25), benchmark("b", 5, 0.0), benchmark("a", 5, 0.5)]},
        {"name": "missing", "benchmarks": [benchmark("a", 0, 0.25), benchmark("none", 0, 0.25)]},
        {"name": "one", "benchmarks": [benchmark("c", 10, 0.1)]},
    ]
    cfg = {
        "weighting": weighting,
        "subtract_random_baseline": subtract,
        "rescale_accuracy": rescale,
        "averages": {"all": ["world", "missing", "one"], "lost": ["missing"]},
    }
    values = {"a/0-shot": 0.3, "b/5-shot": 0.7, "a/5-shot": 0.1, "c/10-shot/x": 0.9, "c/10-shot/y": 0.2}
    sizes = {"a/0-shot": 100, "b/5-shot": 3, "a/5-shot": 100, "c/10-shot/x": 1, "c/10-shot/y": 40}
    computed = {label: {MC: SimpleNamespace(compute=lambda v=v: torch.tensor(v))} for label, v in values.items()}
    computed["a/0-shot"][ECE] = SimpleNamespace(compute=lambda: torch.tensor(5.0))
    keys = [f"metrics/{label}/{name}" for label, metrics in computed.items() for name in metrics]
    theirs = EvalGauntlet(keys, copy.deepcopy(categories), benchmark_sizes=sizes, **cfg)
    expected = theirs.eval_after_all(SimpleNamespace(eval_metrics=computed), None)
    metrics = {f"metrics/{label}/{MC}": value for label, value in values.items()} | {f"metrics/a/0-shot/{ECE}": 5.0}
    gauntlet = read_gauntlet({"categories": categories, **cfg})
    assert gauntlet_scores(gauntlet, metrics, sizes) == pytest.approx(expected, abs=1e-6)


def test_categories_are_evaluated_by_themselves(evaluate: Callable[..., Results], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "examples.jsonl", definitions(24))
    task = {"label": "task", "icl_task_type": "multiple_choice", "num_fewshot": [1], "dataset_uri": str(path)}
    results = evaluate({**task, "has_categories": True})
    assert list(results.samples) == [f"task/1-shot/{name}" for name in ("even", "neither", "odd")]
    odd = [example for example in definitions(24) if example["category"] == "odd"]
    write_lines(path, odd)
    expected = results.samples["task/1-shot/odd"]
    assert len(expected) > 2
    same_samples(evaluate(task).samples, {"task/1-shot": expected})
    same_samples(evaluate(task, limit=2).samples, {"task/1-shot": expected[:2]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_uri": "/nowhere.jsonl"}, "icl_tasks: t: dataset_uri: /nowhere.jsonl: cannot be read: No such file"),
        ({"dataset_uri": "hf://a/b"}, "hf://a/b: examples are read from JSON Lines"),
        ({"metric_names": [LM]}, f"icl_tasks: t: metric_names: {LM}: no metric of multiple_choice; allowed: {MC}"),
        ({"context_key": "text"}, "t/0-shot: example 1: text: absent among query, choices"),
        ({"choices_key": "query"}, 'example 1: query: got "def .*, not a list of texts'),
        ({"max_seq_len": 2}, r"example 1: an answer of \d+ tokens does not fit in max_seq_len, 2"),
        ({"prelimiter": "", "context_key": "none"}, "example 1: there is no token before the answer"),
        ({"icl_task_type": "code_evaluation"}, "icl_tasks: t: allow_code_execution=False: must be True"),
        (
            {"icl_task_type": "code_evaluation", "allow_code_execution": True, "pass_at_k": [5]},
            r"generations_per_sample=1: below pass_at_k=\[5\]",
        ),
    ],
    ids=str,
)
def test_bad_tasks_are_named(evaluate: Callable[..., Results], tmp_path: Path, changes: Task, message: str) -> None:
    path = write_lines(tmp_path / "examples.jsonl", [{**each, "none": ""} for each in definitions(3)])
    task = {"label": "t", "icl_task_type": "multiple_choice", "num_fewshot": [0], "dataset_uri": str(path)}
    if "none" in changes.values():
        changes = {**changes, "continuation_delimiter": ""}
    with pytest.raises(UserError, match=message):
        evaluate({**task, **changes})


def problem_named(name: str, **changes: str) -> dict[str, str]:
    return {**problems()[0], "task_id": name, **changes}


MANY = "word " * 300
BAD: list[tuple[str, list[dict[str, Any]], Task, str]] = [
    (
        "multiple_choice",
        [{"query": "a", "choices": ["x", "y"], "gold": gold} for gold in (1, 2)],
        {},
        "gold: got 2, not a number from 0 to 1",
    ),
    (
        "schema",
        [{"context_options": ["a", "b"], "continuation": "c", "gold": gold} for gold in (0, -1)],
        {},
        "gold: got -1, not a number from 0 to 1",
    ),
    (
        "language_modeling",
        [{"context": "a", "continuation": text} for text in ("b", MANY)],
        {},
        rf"an answer of \d+ tokens does not fit in max_seq_len, {LENGTH}; allowed at continuation: at most 255",
    ),
    (
        "language_modeling",
        [{"context": text, "continuation": "b"} for text in ("a", "")],
        {"continuation_delimiter": ""},
        "there is no token before the answer: context is empty, and neither prompt_string nor prelimiter gives one",
    ),
    (
        "generation_task_with_answers",
        [{"context": "a", "answer": "b", "aliases": each} for each in ([], 3)],
        {},
        "aliases: got 3, not a list of texts",
    ),
    (
        "infilling",
        [{"prefix": "a", "suffix": "c", "middle": text} for text in ("b", MANY)],
        {},
        rf"middle: \d+ tokens in max_seq_len, {LENGTH}, leave no room for the special tokens .*; allowed: at most 252",
    ),
    (
        "code_evaluation",
        [problem_named("a"), problem_named("b", test="def check(candidate)\n")],
        {"allow_code_execution": True},
        "b: the test is broken: SyntaxError",
    ),
]
"""Two examples of each type of task, of which the second is bad, and what is said of it."""


@pytest.mark.parametrize("shots", [[0], [5, 3]], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize(("kind", "examples", "changes", "message"), BAD, ids=lambda each: str(each)[:20])
def test_a_bad_example_is_named_without_a_model(
    trained: Trained, tmp_path: Path, kind: str, examples: list[Task], changes: Task, message: str, shots: list[int]
) -> None:
    """Even where the limit leaves it out: it may be drawn as a solved one. Lines are counted as an editor counts."""
    first, bad = (json.dumps(each) for each in examples)
    path = tmp_path / "examples.jsonl"
    path.write_text(f"\n{first}\n\n{bad}\n")
    task = {"label": "t", "icl_task_type": kind, "dataset_uri": str(path), "num_fewshot": shots, **changes}
    loaded = load_tasks(read_tasks([task]))
    empty = "no token before" in message and shots != [0]  # a solved example stands before it
    expected = does_not_raise() if empty else pytest.raises(UserError, match=message)
    with expected as found:
        check_tasks(PromptTokenizer.of_checkpoint(trained.checkpoint), loaded, Sizes(4, LENGTH, 1))
    if found is not None:
        assert str(found.value).startswith(f"icl_tasks: t: {path}: line 4: t/{min(shots)}-shot: example 2: ")


@pytest.mark.parametrize("kind", ["generation_task_with_answers", "infilling", "code_evaluation"])
def test_more_new_tokens_than_fit_are_named_without_a_model(trained: Trained, tmp_path: Path, kind: str) -> None:
    examples = {
        "generation_task_with_answers": definitions(2),
        "infilling": gaps(),
        "code_evaluation": [*map(problem_named, "ab")],
    }
    uri = str(write_lines(tmp_path / "examples.jsonl", examples[kind]))
    task: Task = {"label": "t", "icl_task_type": kind, "dataset_uri": uri, "num_fewshot": [0]}
    task |= {"allow_code_execution": True} if kind == "code_evaluation" else {}
    most, tokenizer = LENGTH - (3 if kind == "infilling" else 1), PromptTokenizer.of_checkpoint(trained.checkpoint)

    def check(new_tokens: int) -> None:
        keys = {"generation_kwargs": {"max_new_tokens": new_tokens}}
        check_tasks(tokenizer, load_tasks(read_tasks([task | keys])), Sizes(4, LENGTH))

    check(most)
    message = f"generation_kwargs.max_new_tokens: {most + 1}, and {most + 1} new tokens do not fit in max_seq_len, "
    with pytest.raises(UserError, match=f"^icl_tasks: t: {re.escape(message)}{LENGTH}; allowed: at most {most}$"):
        check(most + 1)


def test_training_and_validation_refuse_a_bad_example_before_they_begin(
    tiny_recipe: Callable[..., Recipe], tiny_overrides: Callable[..., list[str]], tmp_path: Path, capsys
) -> None:
    from moefoundry.cli.main import main
    from moefoundry.evaluation.tasks.callback import IclTasks

    path = write_lines(tmp_path / "examples.jsonl", [{**each, "gold": 2} for each in definitions(1)])
    tasks = f"icl_tasks=[{{label: t, icl_task_type: multiple_choice, num_fewshot: [0], dataset_uri: {path}}}]"
    message = f"icl_tasks: t: {path}: line 1: t/0-shot: example 1: gold: got 2, not a number from 0 to 1"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        IclTasks(tiny_recipe(tmp_path / "run", tasks))
    assert main(["validate", *tiny_overrides(tmp_path / "run", tasks)]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    write_lines(path, definitions(1))
    assert main(["validate", *tiny_overrides(tmp_path / "run", tasks)]) == 0
    assert main(["validate", *tiny_overrides(tmp_path / "run", tasks.replace(str(path), "s3://bucket/x.jsonl"))]) == 0
    path.unlink()
    assert main(["validate", *tiny_overrides(tmp_path / "run", tasks)]) == 2
    assert f"icl_tasks: t: dataset_uri: {path}: cannot be read" in capsys.readouterr().err


def test_two_problems_of_one_name_are_refused(evaluate: Callable[..., Results], tmp_path: Path) -> None:
    """Before anything is completed: one's completions would run against the other's test."""
    problem = dict.fromkeys(("prompt", "canonical_solution", "test"), "pass\n") | {"task_id": "p/0", "entry_point": "f"}
    path = write_lines(tmp_path / "examples.jsonl", [problem, problem | {"test": "fail\n"}])
    task = {"label": "t", "icl_task_type": "code_evaluation", "num_fewshot": [0], "dataset_uri": str(path)}
    with pytest.raises(UserError, match=r"examples\.jsonl: task_id: 'p/0' names 2 problems; give each a name"):
        evaluate({**task, "allow_code_execution": True})


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["torn", "deep"])
def test_a_line_that_is_no_json_is_named(evaluate: Callable[..., Results], tmp_path: Path, text: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(f"\n{text}\n")
    with pytest.raises(UserError, match=r"examples\.jsonl: line 2: not JSON"):
        evaluate({"label": "t", "icl_task_type": "multiple_choice", "num_fewshot": [0], "dataset_uri": str(path)})


def test_wrong_keys_are_listed_together(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("icl_tasks: [{label: a/b, num_fewshot: 0, icl_task_type: choice}, 3, {prompt_strng: x}]")
    with pytest.raises(ConfigError) as caught:
        read_tasks(str(file))
    problems = {problem.path: problem for problem in caught.value.problems}
    assert list(problems) == [
        "icl_tasks[0].label",
        "icl_tasks[0].icl_task_type",
        "icl_tasks[0].dataset_uri",
        "icl_tasks[0].num_fewshot",
        "icl_tasks[1]",
        "icl_tasks[2].label",
        "icl_tasks[2].icl_task_type",
        "icl_tasks[2].dataset_uri",
        "icl_tasks[2].num_fewshot",
        "icl_tasks[2].prompt_strng",
    ]
    assert problems["icl_tasks[0].icl_task_type"].allowed.startswith("multiple_choice, schema, language_modeling")
    assert problems["icl_tasks[2].prompt_strng"].suggestion == "icl_tasks[2].prompt_string"
    for value, message in (({}, "got a mapping"), ("/nowhere.yaml", "icl_tasks: /nowhere.yaml: no such file")):
        with pytest.raises(ConfigError, match=message):
            read_tasks(value)
    file.write_text("tasks: []")
    with pytest.raises(ConfigError, match="icl_tasks: missing; allowed: a file with this key"):
        read_tasks(str(file))
    twice = {"label": "a", "icl_task_type": "schema", "num_fewshot": [0], "dataset_uri": "x"}
    with pytest.raises(ConfigError, match="label 'a' stands at several tasks"):
        read_tasks([twice, twice])
    with pytest.raises(ConfigError, match="question_prelimiter: is another name of prelimiter"):
        read_tasks([{**twice, "prelimiter": "a", "question_prelimiter": "b"}])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "eval_gauntlet: got a list"),
        ({"categories": [{"name": "a", "benchmarks": [{"name": "b"}]}]}, r"benchmarks\[0\].num_fewshot: missing"),
        ({"weighting": "SIZE"}, "eval_gauntlet.weighting: got 'SIZE'; allowed: EQUAL, SAMPLE_SZ, LOG_SAMPLE_SZ"),
        ({"subtract_random_baseline": False}, "rescale_accuracy: true, but subtract_random_baseline is false"),
        ({"averages": {"all": ["a"]}}, "eval_gauntlet.averages.all: no category 'a'"),
        ({"averages": []}, "eval_gauntlet.averages: got a list"),
    ],
    ids=str,
)
def test_bad_gauntlets_are_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_gauntlet(value)


def test_fewer_examples_than_asked_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "examples.jsonl", definitions(9))
    count = sum(each["category"] == "odd" for each in definitions(9))
    task = {"icl_task_type": "multiple_choice", "dataset_uri": str(path), "num_fewshot": [1, 8, 9]}
    tasks = [{"label": "a", **task}, {"label": "b", **task, "num_fewshot": [count], "has_categories": True}]
    say_what_is_left_out(None, load_tasks(read_tasks(tasks)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"warning: icl_tasks: a/9-shot: 8 solved example(s) stand before a question, as {path} has 9 example(s)"
    )
    assert f"icl_tasks: b/{count}-shot/odd: {count - 1} solved example(s)" in "".join(lines[1:])


def test_what_a_gauntlet_leaves_out_is_said() -> None:
    tasks = read_tasks([{"label": "a", "icl_task_type": "multiple_choice", "num_fewshot": [0, 5], "dataset_uri": "x"}])
    categories = [
        {"name": "all", "benchmarks": [{"name": "a", "num_fewshot": 5}]},
        {"name": "some", "benchmarks": [{"name": "a", "num_fewshot": 0}, {"name": "b", "num_fewshot": 0}]},
    ]
    gauntlet = read_gauntlet({"categories": categories})
    assert left_out(gauntlet, tasks) == ["eval_gauntlet: some is left out: icl_tasks have no b/0-shot"]
