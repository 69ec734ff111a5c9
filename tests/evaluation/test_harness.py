"""The harness asks our model, and its own model of what is exported: every number is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moefoundry.cli.main import main
from tests.distributed import run_distributed
from tests.evaluation.tiny_tasks import Trained, definitions, eval_data, write_lines

LENGTH = 128
pytest.importorskip("lm_eval", reason="lm_eval, of the extra eval, is not installed")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks of every type of request, on local data."""
    root = tmp_path_factory.mktemp("harness")
    own = write_lines(root / "own.jsonl", [{**each, "gold": int(each["gold"])} for each in definitions(24)])
    copa = root / "copa.jsonl"
    copa.write_text("".join(eval_data("copa.jsonl").read_text().splitlines(keepends=True)[:20]))
    common: dict[str, Any] = {"dataset_path": "json", "test_split": "train", "num_fewshot": 0}
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "gold"}
    choice |= {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}} return value"}
    text |= {"metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}]}
    written = {"output_type": "generate_until", "doc_to_text": "{{context}}"}
    written["doc_to_target"] = "{{ ' return ' if answer != 'no answer' else 'none' }}"
    written |= {
        "generation_kwargs": {"until": ["value"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    last = {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": " return value"}
    last |= {"metric_list": [{"metric": "perplexity"}, {"metric": "acc"}], "target_delimiter": ""}
    for name, task, file in (
        ("own_choice", {**choice, "num_fewshot": 2, "fewshot_split": "train"}, own),
        ("own_copa", choice, copa),
        ("own_text", text, own),
        ("own_written", written, own),
        ("own_last", last, own),
    ):
        config = {"task": name, **common, "dataset_kwargs": {"data_files": str(file)}, **task}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def names(tasks: Path) -> list[str]:
    return sorted(path.stem for path in tasks.glob("*.yaml"))


@pytest.fixture(scope="module")
def expected(trained: Trained, tasks: Path, names: list[str]) -> dict[str, float]:
    """What the harness finds with its own model for transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from moefoundry.evaluation.harness import rows_of

    model = HFLM(str(trained.hf), device="cpu", dtype=torch.float32, batch_size=3, max_length=LENGTH)
    results = simple_evaluate(model, tasks=names, task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0)
    return {f"{task}/{name}": value for task, name, value in rows_of(results)}


def by_command(place: Path, tasks: Path, names: list[str], output: Path, *options: str) -> dict[str, float]:
    """What our command finds and writes."""
    import contextlib
    import io

    arguments = ["--harness", ",".join(names), "--harness-include", str(tasks), "--max-seq-len", str(LENGTH)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["eval", str(place), *arguments, "-o", str(output), "--json", "--device", "cpu", *options]) == 0
    return json.loads(out.getvalue() or '{"metrics": {}}')["metrics"]


def to_the_last_digit(metrics: dict[str, float]) -> dict[str, str]:
    """As the harness prints them."""
    return {name: f"{value:.4f}" for name, value in metrics.items()}


def test_numbers_are_the_harness_own(
    trained: Trained, tasks: Path, names: list[str], expected: dict[str, float], tmp_path: Path
) -> None:
    found = by_command(trained.checkpoint, tasks, names, tmp_path / "samples.jsonl", "--batch-size", "4")
    assert to_the_last_digit(found) == to_the_last_digit(expected)
    assert len(found) >= 8
    assert 0 < found["own_written/exact_match,none"] < 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert [sample["task"] for sample in samples].count("own_copa") == 20
    assert by_command(trained.hf, tasks, ["own_copa"], tmp_path / "hf.jsonl") == {
        name: found[name] for name in found if name.startswith("own_copa")
    }


def test_ranks_change_nothing(
    trained: Trained, tasks: Path, names: list[str], expected: dict[str, float], tmp_path: Path
) -> None:
    options = (trained.checkpoint, tasks, names, tmp_path / "samples.jsonl", "--mesh", "{expert: 2}")
    found = run_distributed(by_command, 2, *options)
    assert to_the_last_digit(found[0]) == to_the_last_digit(expected)
    assert found[1] == {}, "one rank speaks"


@pytest.mark.slow
def test_bad_names_are_one_line(trained: Trained, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained.hf), "--harness", "no_such_task", "--harness-include", str(tasks)]) == 2
    assert "--harness no_such_task: no such task" in capsys.readouterr().err.splitlines()[-1]
