"""Choices: several answers to a question, or one answer to several (Winograd schemas).

That choice is made whose answer has the highest mean log-probability, the first of equal ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from math import exp

from moefoundry.config.schema_tasks import Metric, MultipleChoiceConfig, SchemaConfig
from moefoundry.evaluation.batched import Continuation, Score
from moefoundry.evaluation.tasks.examples import Example, gold_of, text_at, texts_at
from moefoundry.evaluation.tasks.prompts import Prompts
from moefoundry.evaluation.tasks.task import Evaluation, Measure, Questions, Sample, accuracy, calibration_error

CHOICE_METRICS: Mapping[str, Measure] = {Metric.choice_accuracy: accuracy, Metric.choice_calibration: calibration_error}

CONTINUATION = "continuation"
"""Key of the answer of a schema."""


class _Choice(ABC):
    """Task whose examples each have several continuations, of which the likeliest is chosen."""

    metrics = CHOICE_METRICS
    usual: Sequence[str] = (Metric.choice_accuracy,)

    def evaluate(self, evaluation: Evaluation) -> list[Sample]:
        """Choose for each example."""
        rows = self._rows(evaluation)
        scores = iter(evaluation.model.score([each for row in rows for each in row], evaluation.label))
        return [
            _sample(evaluation.prompts, example, row, [next(scores) for _ in row])
            for example, row in zip(evaluation.examples, rows, strict=True)
        ]

    def check(self, questions: Questions) -> None:
        """Make what may be chosen for each example."""
        self._rows(questions)

    def _rows(self, questions: Questions) -> list[list[Continuation]]:
        prompts = questions.prompts

        def row(example: Example, preceding: str) -> list[Continuation]:
            continuations = self._continuations(prompts, example, preceding)
            gold_of(example, len(continuations))
            return continuations

        return questions.made(partial(self._solved, prompts), row)

    @abstractmethod
    def _solved(self, prompts: Prompts, example: Example, preceding: str) -> str:
        """Write an example with its right answer, as it stands before another."""

    @abstractmethod
    def _continuations(self, prompts: Prompts, example: Example, preceding: str) -> list[Continuation]:
        """List what may be chosen."""


class MultipleChoice(_Choice):
    """Task of several answers to one question."""

    def __init__(self, cfg: MultipleChoiceConfig) -> None:
        self.cfg = cfg

    def _solved(self, prompts: Prompts, example: Example, preceding: str) -> str:
        choices = texts_at(example, self.cfg.choices_key)
        answer = choices[gold_of(example, len(choices))]
        return prompts.question(text_at(example, self.cfg.context_key), preceding) + answer

    def _continuations(self, prompts: Prompts, example: Example, preceding: str) -> list[Continuation]:
        context = prompts.context(preceding, prompts.question(text_at(example, self.cfg.context_key), preceding))
        answers = texts_at(example, self.cfg.choices_key)
        keys = self.cfg.context_key, self.cfg.choices_key
        return [prompts.continuation(context, keys[0], prompts.with_blank(answer), keys[1]) for answer in answers]


class Schema(_Choice):
    """Task of one answer to several questions."""

    def __init__(self, cfg: SchemaConfig) -> None:
        self.cfg = cfg

    def _solved(self, prompts: Prompts, example: Example, preceding: str) -> str:
        questions = texts_at(example, self.cfg.choices_key)
        delimiter = self.cfg.example_delimiter if preceding else ""
        text = f"{delimiter}{questions[gold_of(example, len(questions))]}{self.cfg.continuation_delimiter}"
        return f"{self.cfg.prelimiter}{text}{text_at(example, CONTINUATION)}"

    def _continuations(self, prompts: Prompts, example: Example, preceding: str) -> list[Continuation]:
        """Without a text before it, LLM Foundry puts no delimiter behind a question."""
        begin, end = self.cfg.prelimiter, ""
        if preceding:
            begin, end = begin + self.cfg.example_delimiter, self.cfg.continuation_delimiter
        end = end.rstrip() if self.cfg.strip_dataset else end
        answer = prompts.with_blank(text_at(example, CONTINUATION))
        contexts = [
            prompts.context(preceding, f"{begin}{question}{end}", strip=False)
            for question in texts_at(example, self.cfg.choices_key)
        ]
        return [prompts.continuation(context, self.cfg.choices_key, answer, CONTINUATION) for context in contexts]


def _sample(prompts: Prompts, example: Example, row: Sequence[Continuation], scores: Sequence[Score]) -> Sample:
    means = [sum(score.logprobs) / len(score.logprobs) for score in scores]
    likely = [sum(map(exp, score.logprobs)) / len(score.logprobs) for score in scores]
    gold, chosen = gold_of(example, len(row)), means.index(max(means))
    return {
        "context": prompts.decode(row[gold].context),
        "choices": [prompts.decode(each.tokens) for each in row],
        "logprobs": [sum(score.logprobs) for score in scores],
        "tokens": [len(score.logprobs) for score in scores],
        "gold": gold,
        "chosen": chosen,
        "correct": chosen == gold,
        "confidence": max(likely) / sum(likely),
        "calibrated": likely.index(max(likely)) == gold,
    }
