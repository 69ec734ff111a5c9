"""Language modelling, as LAMBADA has it: every token of the continuation must be the likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moefoundry.config.schema_tasks import LanguageModelingConfig, Metric
from moefoundry.evaluation.batched import Continuation
from moefoundry.evaluation.tasks.examples import Example, text_at
from moefoundry.evaluation.tasks.task import Evaluation, Measure, Questions, Sample, accuracy, calibration_error


class LanguageModeling:
    """Task of one continuation."""

    metrics: Mapping[str, Measure] = {Metric.lm_accuracy: accuracy, Metric.lm_calibration: calibration_error}
    usual: Sequence[str] = (Metric.lm_accuracy,)

    def __init__(self, cfg: LanguageModelingConfig) -> None:
        self.cfg = cfg

    def check(self, questions: Questions) -> None:
        """Make each continuation."""
        self._rows(questions)

    def evaluate(self, evaluation: Evaluation) -> list[Sample]:
        """Compare each continuation with the likeliest tokens."""
        prompts, rows = evaluation.prompts, self._rows(evaluation)
        scores = evaluation.model.score(rows, evaluation.label)
        return [
            {
                "context": prompts.decode(row.context),
                "continuation": prompts.decode(row.tokens),
                "likeliest": prompts.decode(score.likeliest),
                "logprob": sum(score.logprobs),
                "tokens": len(row.tokens),
                "correct": score.likeliest == row.tokens,
                "confidence": min(score.confidences),
                "calibrated": score.likeliest == row.tokens,
            }
            for row, score in zip(rows, scores, strict=True)
        ]

    def _rows(self, questions: Questions) -> list[Continuation]:
        prompts = questions.prompts

        def question(example: Example, preceding: str) -> str:
            return prompts.question(text_at(example, self.cfg.context_key), preceding)

        def solved(example: Example, preceding: str) -> str:
            return question(example, preceding) + text_at(example, self.cfg.answer_key)

        def continuation(example: Example, preceding: str) -> Continuation:
            answer = prompts.with_blank(text_at(example, self.cfg.answer_key))
            context = prompts.context(preceding, question(example, preceding))
            return prompts.continuation(context, self.cfg.context_key, answer, self.cfg.answer_key)

        return questions.made(solved, continuation)
