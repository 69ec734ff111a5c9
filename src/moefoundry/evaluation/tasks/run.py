"""Evaluate tasks: read their examples, ask the model, compute metrics and averages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.ranks import on_rank_zero, rank
from moefoundry.config import Recipe, UserError
from moefoundry.config.making import make_part
from moefoundry.config.schema_tasks import TaskConfig
from moefoundry.config.tasks import Gauntlet
from moefoundry.evaluation.batched import BatchedModel
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.evaluation.tasks.examples import CATEGORY, Example, is_remote, read_examples
from moefoundry.evaluation.tasks.gauntlet import gauntlet_scores, left_out
from moefoundry.evaluation.tasks.prompts import Prompts, stripped
from moefoundry.evaluation.tasks.task import Checked, Evaluation, Questions, Sample, Task
from moefoundry.model.transformer import MoETransformer


@dataclass(frozen=True)
class LoadedTask:
    """Task that is ready to be evaluated.

    Attributes:
        cfg: Its keys.
        task: Its type.
        examples: Its examples by category, by the numbers of their lines; one category ``""`` where there are none.
    """

    cfg: TaskConfig
    task: Task
    examples: Mapping[str, Mapping[int, Example]]


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

    @classmethod
    def of(cls, recipe: Recipe) -> Sizes:
        """Give those of a recipe."""
        batch_size, limit = recipe.device_eval_batch_size, recipe.icl_subset_num_batches
        return cls(batch_size, recipe.icl_seq_len or recipe.max_seq_len, limit and limit * batch_size)


@dataclass(frozen=True)
class Results:
    """Outcome of all tasks, the same on every rank.

    Attributes:
        metrics: ``metrics/LABEL/N-shot/METRIC``, and the averages of the gauntlet.
        samples: Samples by ``LABEL/N-shot`` or ``LABEL/N-shot/CATEGORY``.
    """

    metrics: dict[str, float]
    samples: dict[str, list[Sample]]


def load_tasks(configs: Sequence[TaskConfig], remote: bool = True) -> list[LoadedTask]:
    """Read the examples of tasks, on rank 0 for all; every rank calls it.

    Args:
        configs: Keys of the tasks.
        remote: False leaves out the examples behind URLs.

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
        absent = not remote and is_remote(cfg.dataset_uri)
        loaded.append(LoadedTask(cfg, task, {} if absent else on_rank_zero(partial(_by_category, cfg))))
    return loaded


def _by_category(cfg: TaskConfig) -> dict[str, dict[int, Example]]:
    """Read the examples, in the order of their categories."""
    try:
        examples = read_examples(cfg.dataset_uri)
    except UserError as error:
        raise UserError(f"icl_tasks: {cfg.label}: dataset_uri: {error}") from error
    if not cfg.has_categories:
        return {"": examples}
    found: dict[str, dict[int, Example]] = {}
    for number, example in examples.items():
        category = example.get(CATEGORY)
        if not isinstance(category, str) or not category:
            message = f"{cfg.dataset_uri}: line {number}: no text at the key {CATEGORY}"
            raise UserError(f"icl_tasks: {cfg.label}: has_categories: {message}")
        found.setdefault(category, {})[number] = example
    return dict(sorted(found.items()))


def check_tasks(
    tokenizer: PromptTokenizer, tasks: Sequence[LoadedTask], sizes: Sizes, recipe: Mapping[str, Any] | None = None
) -> None:
    """Check all examples of tasks, on rank 0 for all, so that none ends a run later; every rank calls it.

    Solved examples are text before a question, the beginning of which is cut off: one stands for any number of them.

    Args:
        tokenizer: The model's own.
        tasks: The tasks; of those of other packages, the ones that can be checked are.
        sizes: Limits that they share; all examples are checked.
        recipe: As for :func:`evaluate_tasks`.

    Raises:
        UserError: An example is not of its task's form, or does not fit; its line is named.
    """
    on_rank_zero(partial(_check_tasks, tokenizer, tasks, replace(sizes, limit=None), recipe or {}))


def _check_tasks(
    tokenizer: PromptTokenizer, tasks: Sequence[LoadedTask], sizes: Sizes, recipe: Mapping[str, Any]
) -> None:
    for loaded in tasks:
        if isinstance(loaded.task, Checked):
            fewest = min(loaded.cfg.num_fewshot)
            for questions in _questions(tokenizer, loaded, sizes, recipe, fewest):
                with _named(loaded):
                    loaded.task.check(replace(questions, num_fewshot=min(fewest, 1)))


@contextmanager
def _named(loaded: LoadedTask) -> Iterator[None]:
    """Begin an error of the block with the task's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"icl_tasks: {loaded.cfg.label}: {error}") from error


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
        for num_fewshot in loaded.cfg.num_fewshot:
            for questions in _questions(tokenizer, loaded, sizes, recipe or {}, num_fewshot):
                with _named(loaded):
                    found = loaded.task.evaluate(Evaluation(**vars(questions), model=batched))
                samples[questions.label] = found
                for name in loaded.cfg.metric_names or loaded.task.usual:
                    metrics[f"metrics/{questions.label}/{name}"] = loaded.task.metrics[name](found)
    if gauntlet is not None:
        metrics |= gauntlet_scores(gauntlet, metrics, {label: len(found) for label, found in samples.items()})
    return Results(metrics, samples)


def _questions(
    tokenizer: PromptTokenizer, loaded: LoadedTask, sizes: Sizes, recipe: Mapping[str, Any], num_fewshot: int
) -> Iterator[Questions]:
    """Yield the questions of each category."""
    cfg = loaded.cfg
    prompts = Prompts(cfg, tokenizer, cfg.max_seq_len or sizes.max_seq_len)
    for category, examples in loaded.examples.items():
        usable = [stripped(each) if cfg.strip_dataset else each for each in examples.values()]
        yield Questions(
            label=f"{cfg.label}/{num_fewshot}-shot" + (f"/{category}" if category else ""),
            examples=usable[: sizes.limit],
            drawn_from=usable,
            num_fewshot=num_fewshot,
            prompts=prompts,
            recipe=recipe,
            lines=[*examples],
        )


def write_samples(file: Path, results: Results) -> None:
    """Write the samples of all tasks as JSON Lines, with the name of their task."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for label, samples in results.samples.items():
            for number, sample in enumerate(samples):
                line: dict[str, Any] = {"task": label, "example": number, **sample}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
