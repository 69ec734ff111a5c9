"""Evaluate tasks: read their examples, ask the model, compute metrics and averages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.ranks import on_rank_zero, rank
from moefoundry.config import UserError
from moefoundry.config.making import make_part
from moefoundry.config.schema_tasks import TaskConfig
from moefoundry.config.tasks import Gauntlet
from moefoundry.evaluation.batched import BatchedModel
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.evaluation.tasks.examples import CATEGORY, Example, read_examples
from moefoundry.evaluation.tasks.gauntlet import gauntlet_scores, left_out
from moefoundry.evaluation.tasks.prompts import Prompts, stripped
from moefoundry.evaluation.tasks.task import Evaluation, Sample, Task
from moefoundry.model.transformer import MoETransformer


@dataclass(frozen=True)
class LoadedTask:
    """Task that is ready to be evaluated.

    Attributes:
        cfg: Its keys.
        task: Its type.
        examples: Its examples by category; one category ``""`` where there are none.
    """

    cfg: TaskConfig
    task: Task
    examples: Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Sizes:
    """Sizes that the tasks have in common.

    Attributes:
        batch_size: Sequences of one forward pass of one rank, for tasks without a ``batch_size``.
        max_seq_len: Tokens of a sequence at most, for tasks without a ``max_seq_len``.
        limit: Examples of each task and category at most, the first ones; None is all.
    """

    batch_size: int
    max_seq_len: int
    limit: int | None = None


@dataclass(frozen=True)
class Results:
    """Outcome of all tasks, the same on every rank.

    Attributes:
        metrics: ``metrics/LABEL/N-shot/METRIC``, and the averages of the gauntlet.
        samples: Samples by ``LABEL/N-shot`` or ``LABEL/N-shot/CATEGORY``.
    """

    metrics: dict[str, float]
    samples: dict[str, list[Sample]]


def load_tasks(configs: Sequence[TaskConfig]) -> list[LoadedTask]:
    """Read the examples of tasks, on rank 0 for all; every rank calls it.

    Raises:
        UserError: A file cannot be used, a metric is not of its task's type, or a task may not run.
    """
    loaded = []
    for cfg in configs:
        try:
            task: Task = make_part("icl_task_types", cfg.icl_task_type, "icl_task_type", cfg)
        except UserError as error:
            raise UserError(f"icl_tasks: {cfg.label}: {error}") from error
        if unknown := [name for name in cfg.metric_names if name not in task.metrics]:
            known = ", ".join(task.metrics)
            message = f"{unknown[0]}: no metric of {cfg.icl_task_type}; allowed: {known}"
            raise UserError(f"icl_tasks: {cfg.label}: metric_names: {message}")
        loaded.append(LoadedTask(cfg, task, on_rank_zero(partial(_by_category, cfg))))
    return loaded


def _by_category(cfg: TaskConfig) -> dict[str, list[Example]]:
    """Read the examples, in the order of their categories."""
    try:
        examples = read_examples(cfg.dataset_uri)
    except UserError as error:
        raise UserError(f"icl_tasks: {cfg.label}: dataset_uri: {error}") from error
    if not cfg.has_categories:
        return {"": examples}
    found: dict[str, list[Example]] = {}
    for number, example in enumerate(examples, 1):
        category = example.get(CATEGORY)
        if not isinstance(category, str) or not category:
            message = f"example {number} of {cfg.dataset_uri} has no text at the key {CATEGORY}"
            raise UserError(f"icl_tasks: {cfg.label}: has_categories: {message}")
        found.setdefault(category, []).append(example)
    return dict(sorted(found.items()))


def say_what_is_left_out(gauntlet: Gauntlet | None, tasks: Sequence[LoadedTask]) -> None:
    """Warn on rank 0 of averages whose tasks are not evaluated, and of tasks with fewer solved examples than asked."""
    if rank() == 0:
        averages = [] if gauntlet is None else left_out(gauntlet, [task.cfg for task in tasks])
        for text in (*averages, *_with_too_few_examples(tasks)):
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _with_too_few_examples(tasks: Sequence[LoadedTask]) -> Iterator[str]:
    """Say where the other examples are fewer than those that are to stand before a question."""
    for task in tasks:
        for shots in task.cfg.num_fewshot:
            for category, examples in task.examples.items():
                if shots >= len(examples):
                    where = f"{task.cfg.label}/{shots}-shot" + (f"/{category}" if category else "")
                    others = f"{len(examples) - 1} solved example(s) stand before a question"
                    yield f"icl_tasks: {where}: {others}, as {task.cfg.dataset_uri} has {len(examples)} example(s)"


def evaluate_tasks(
    model: MoETransformer,
    tokenizer: PromptTokenizer,
    tasks: Sequence[LoadedTask],
    sizes: Sizes,
    *,
    gauntlet: Gauntlet | None = None,
    recipe: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Results:
    """Evaluate tasks; every rank calls it.

    Args:
        model: In evaluation mode; whole or sharded.
        tokenizer: The model's own.
        tasks: The tasks.
        sizes: Limits that they share.
        gauntlet: Averages to compute; those of which a task is missing are left out.
        recipe: Flat recipe of the model, which infilling follows; None where there is none.
        progress: Show a bar on a terminal.

    Raises:
        UserError: An example is not of its task's form, or does not fit; it is named.
    """
    metrics: dict[str, float] = {}
    samples: dict[str, list[Sample]] = {}
    for loaded in tasks:
        batched = BatchedModel(model, loaded.cfg.batch_size or sizes.batch_size, progress)
        for evaluation in _evaluations(batched, tokenizer, loaded, sizes, recipe or {}):
            try:
                found = samples[evaluation.label] = loaded.task.evaluate(evaluation)
            except UserError as error:
                raise UserError(f"icl_tasks: {loaded.cfg.label}: {error}") from error
            for name in loaded.cfg.metric_names or loaded.task.usual:
                metrics[f"metrics/{evaluation.label}/{name}"] = loaded.task.metrics[name](found)
    if gauntlet is not None:
        metrics |= gauntlet_scores(gauntlet, metrics, {label: len(found) for label, found in samples.items()})
    return Results(metrics, samples)


def _evaluations(
    model: BatchedModel, tokenizer: PromptTokenizer, loaded: LoadedTask, sizes: Sizes, recipe: Mapping[str, Any]
) -> Iterator[Evaluation]:
    cfg = loaded.cfg
    prompts = Prompts(cfg, tokenizer, cfg.max_seq_len or sizes.max_seq_len)
    for num_fewshot in cfg.num_fewshot:
        for category, examples in loaded.examples.items():
            label = f"{cfg.label}/{num_fewshot}-shot" + (f"/{category}" if category else "")
            usable = [stripped(each) for each in examples] if cfg.strip_dataset else examples
            yield Evaluation(label, usable[: sizes.limit], usable, num_fewshot, model, prompts, recipe)


def write_samples(file: Path, results: Results) -> None:
    """Write the samples of all tasks as JSON Lines, with the name of their task."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for label, samples in results.samples.items():
            for number, sample in enumerate(samples):
                line: dict[str, Any] = {"task": label, "example": number, **sample}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
