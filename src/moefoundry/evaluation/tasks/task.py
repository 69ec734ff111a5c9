"""The interface of task types, and the metrics that several have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

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


@dataclass(frozen=True)
class Evaluation:
    """Input of one evaluation of a task.

    Attributes:
        label: Name in metrics: ``LABEL/N-shot``, or ``LABEL/N-shot/CATEGORY``.
        examples: Examples to evaluate.
        drawn_from: Those, and maybe more: solved examples are drawn from these.
        num_fewshot: Solved examples before each question.
        model: Scores and completes.
        prompts: Makes prompts and tokens.
        recipe: Flat recipe of the model; empty where there is none.
    """

    label: str
    examples: Sequence[Example]
    drawn_from: Sequence[Example]
    num_fewshot: int
    model: BatchedModel
    prompts: Prompts
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def made(self, solved: Callable[[Example, str], str], make: Callable[[Example, str], _T]) -> list[_T]:
        """Make something of each example.

        Args:
            solved: Writes an example with its answer, behind a text.
            make: Called with the example and the text before its question.

        Raises:
            UserError: From either; the example is named.
        """
        made = []
        texts = preceding_texts(self.drawn_from, self.prompts.cfg, self.num_fewshot, solved)
        for number, example in enumerate(self.examples, 1):
            try:
                made.append(make(example, next(texts)))
            except UserError as error:
                raise UserError(f"{self.label}: example {number}: {error}") from error
        return made


class Task(Protocol):
    """Type of task. Every rank calls each method with the same arguments."""

    metrics: Mapping[str, Measure]
    """Metrics by name."""

    usual: Sequence[str]
    """Metrics of a task that names none."""

    def evaluate(self, evaluation: Evaluation) -> list[Sample]:
        """Evaluate each example, in order; every rank gets all samples."""
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
