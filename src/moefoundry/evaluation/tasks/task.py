"""The interface of task types, and the metrics that several have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from moefoundry.config import UserError
from moefoundry.evaluation.batched import BatchedModel
from moefoundry.evaluation.tasks.examples import Example
from moefoundry.evaluation.tasks.prompts import Prompts, preceding_texts

Sample = dict[str, Any]
"""Result of one example, as it is kept: plain values of JSON."""
Measure = Callable[[Sequence[Sample]], float]
"""Metric of all samples of an evaluation, at least one."""
BUCKETS = 10
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions of a task, without the model that answers them.

    Attributes:
        label: Name in metrics: ``LABEL/N-shot``, or ``LABEL/N-shot/CATEGORY``.
        examples: Examples to evaluate.
        drawn_from: Those first, and maybe more: solved examples are drawn from these.
        num_fewshot: Solved examples before each question.
        prompts: Makes prompts and tokens.
        recipe: Flat recipe of the model; empty where there is none.
        lines: Number of the line of each of ``drawn_from`` in its file.
    """

    label: str
    examples: Sequence[Example]
    drawn_from: Sequence[Example]
    num_fewshot: int
    prompts: Prompts
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[int]

    def made(self, solved: Callable[[Example, str], str], make: Callable[[Example, str], _T]) -> list[_T]:
        """Make something of each example.

        Args:
            solved: Writes an example with its answer, behind a text.
            make: Called with the example and the text before its question.

        Raises:
            UserError: From either; the example is named, with its file and line.
        """

        def of(index: int, function: Callable[[Example, str], Any], preceding: str) -> Any:
            try:
                return function(self.drawn_from[index], preceding)
            except UserError as error:
                where = f"{self.prompts.cfg.dataset_uri}: line {self.lines[index]}"
                raise UserError(f"{where}: {self.label}: example {index + 1}: {error}") from error

        count = len(self.drawn_from)
        texts = preceding_texts(
            count, self.prompts.cfg, self.num_fewshot, lambda index, text: str(of(index, solved, text))
        )
        return [of(index, make, next(texts)) for index in range(len(self.examples))]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Questions):
    """Input of one evaluation of a task.

    Attributes:
        model: Scores and completes.
    """

    model: BatchedModel


class Task(Protocol):
    """Type of task. Every rank calls each method with the same arguments."""

    metrics: Mapping[str, Measure]
    """Metrics by name."""

    usual: Sequence[str]
    """Metrics of a task that names none."""

    def evaluate(self, evaluation: Evaluation) -> list[Sample]:
        """Evaluate each example, in order; every rank gets all samples."""
        ...


@runtime_checkable
class Checked(Protocol):
    """Type of task that can check its examples, as all of this package can."""

    def check(self, questions: Questions) -> None:
        """Make all that a model is asked, as it is done before training begins; called on rank 0.

        Raises:
            UserError: An example is not of the task's form, or does not fit.
        """
        ...


def accuracy(samples: Sequence[Sample]) -> float:
    """Compute the share of right samples."""
    return sum(sample["correct"] for sample in samples) / len(samples)


def calibration_error(samples: Sequence[Sample]) -> float:
    """Compute the expected calibration error over ten buckets of confidence, each judged at its middle."""
    total, right = [0] * BUCKETS, [0] * BUCKETS
    for sample in samples:
        bucket = min(int(sample["confidence"] * BUCKETS), BUCKETS - 1)
        total[bucket] += 1
        right[bucket] += sample["calibrated"]
    return sum(
        count / len(samples) * abs(hits / count - (bucket + 0.5) / BUCKETS)
        for bucket, (count, hits) in enumerate(zip(total, right, strict=True))
        if count
    )
