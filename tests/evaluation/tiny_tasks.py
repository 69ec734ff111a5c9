"""Tasks about the text of the tiny corpus, and a tiny model that has learned a little of it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from moefoundry.config import load_recipe
from tests.train.runs import Run, run_recipe

DATA = "MOEFOUNDRY_EVAL_DATA"
MIXTRAL = (
    "model.n_dense_layers=0",
    "model.ffn_hidden_size=null",
    "model.moe.num_shared_experts=0",
    "max_duration=40ba",
    "eval_interval=20ba",
    "optimizer.lr=2e-2",
)
"""Changes of the tiny recipe to a model that transformers has, and that learns."""
NAMES = ("first", "second", "third", "last", "inner", "outer", "left", "right")


def eval_data(name: str) -> Path:
    """A file of the public evaluation data beside the checkout, or of the directory that ``DATA`` names."""
    path = Path(os.environ.get(DATA, Path(__file__).parents[3] / "shared/data/eval")) / name
    if not path.is_file():
        pytest.skip(f"{path}: not there; {DATA} names the directory that holds {name}")
    return path


def write_lines(path: Path, examples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples), encoding="utf-8")
    return path


def definitions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Examples for every type of task, of which the right answer is what stands in the corpus, most of the time."""
    words = random.Random(seed)
    examples = []
    for number in range(count):
        name, other = words.sample(NAMES, 2)
        context, gold = f"def {name}_{number}(value):\n   ", words.randrange(2)
        answers = [" return value", words.choice([" value return", " retain values", " def value"])]
        options = [context, f"{other} = [\n"]
        right = gold if words.random() < 0.8 else 1 - gold
        examples.append(
            {
                "query": context,
                "choices": answers if gold == 0 else answers[::-1],
                "context_options": options if gold == 0 else options[::-1],
                "gold": right,
                "context": context,
                "continuation": answers[right != gold],
                "answer": words.choice(["Return value", "return value", "no answer"]),
                "aliases": ["the value."] if number % 3 else [],
                "category": words.choice(["even", "odd", "neither"]),
            }
        )
    return examples


def problems() -> list[dict[str, str]]:
    """A problem that any comment solves, and one that a tiny model does not."""
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    prompts = ["def f(x):\n    return x + 1  # ", 'def f(x):\n    """Next."""\n']
    return [
        {"task_id": f"T/{n}", "prompt": prompt, "entry_point": "f", "canonical_solution": "", "test": test}
        for n, prompt in enumerate(prompts)
    ]


def gaps() -> list[dict[str, str]]:
    """Texts with gaps, of a line and of more, and texts that a line is to be taken out of."""
    text = "def first(value):\n    return value\n\n\ndef second(value):\n    return value\n"
    cut = [(21, 33), (4, 9), (17, 60)]
    found = [{"prefix": text[:start], "middle": text[start:end], "suffix": text[end:]} for start, end in cut]
    return [*found, *({"text": text.replace("first", name)} for name in NAMES)]


def write_tasks(root: Path) -> Path:
    """A YAML file of tasks on 24 examples, and the examples beside it."""
    uri = str(write_lines(root / "examples.jsonl", definitions(24)))
    tasks = [
        {"label": "choose", "icl_task_type": "multiple_choice", "num_fewshot": [0, 2], "dataset_uri": uri},
        {"label": "pick", "icl_task_type": "schema", "num_fewshot": [1], "dataset_uri": uri},
        {
            "label": "answer",
            "icl_task_type": "generation_task_with_answers",
            "num_fewshot": [1],
            "dataset_uri": uri,
            "early_stopping_criteria": ["\n\n"],
        },
        {
            "label": "code",
            "icl_task_type": "code_evaluation",
            "num_fewshot": [0],
            "dataset_uri": str(write_lines(root / "problems.jsonl", problems())),
            "allow_code_execution": True,
            "pass_at_k": [1, 2],
            "generations_per_sample": 2,
            "timeout": 30,
            "generation_kwargs": {"max_new_tokens": 4, "do_sample": True, "temperature": 2.0},
        },
        {
            "label": "fill",
            "icl_task_type": "infilling",
            "num_fewshot": [0, 1],
            "dataset_uri": str(write_lines(root / "gaps.jsonl", gaps())),
            "generation_kwargs": {"max_new_tokens": 5},
        },
        {"label": "go_on", "icl_task_type": "language_modeling", "num_fewshot": [0], "dataset_uri": uri},
    ]
    path = root / "tasks.yaml"
    averages = [{"name": "easy", "benchmarks": [{"name": "choose", "num_fewshot": 0, "random_baseline": 0.5}]}]
    path.write_text(yaml.safe_dump({"icl_tasks": tasks, "eval_gauntlet": {"categories": averages}}))
    return path


class Trained(NamedTuple):
    """A run of one rank, what it exports, the tasks that it evaluated, and its data."""

    run: Run
    checkpoint: Path
    hf: Path
    tasks: Path
    corpus: str


def train_and_export(overrides: Callable[..., list[str]], root: Path) -> Trained:
    """Train on the tiny corpus, with tasks inside training."""
    from moefoundry.conversion.convert import export_hf

    tasks = write_tasks(root)
    changes = [*MIXTRAL, f"icl_tasks={tasks}", f"eval_gauntlet={tasks}", "icl_seq_len=256", "callbacks.report={}"]
    recipe = load_recipe(None, overrides(root / "run", *changes))
    run = run_recipe(recipe)
    checkpoint = root / "run" / "checkpoints" / "ba40"
    export_hf(checkpoint, root / "hf")
    return Trained(run, checkpoint, root / "hf", tasks, recipe.train_loader.dataset.local)
