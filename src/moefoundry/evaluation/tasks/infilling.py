"""Infilling: gaps that the examples have, or a line taken out of each of their texts.

The model fills a gap as it was trained to, in the order of the parts and with the special tokens of its recipe. It is
judged by the text that it writes, and by how likely it finds the text that was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moefoundry.config import UserError
from moefoundry.config.schema_tasks import InfillingConfig, Metric
from moefoundry.data.fim import SENTINELS
from moefoundry.evaluation.batched import Continuation, Prompt
from moefoundry.evaluation.infilling import (
    FIM,
    Gap,
    Infiller,
    edit_similarity,
    first_line,
    is_one_line,
    lines_taken_out,
)
from moefoundry.evaluation.tasks.examples import Example, text_at
from moefoundry.evaluation.tasks.generated import drawn
from moefoundry.evaluation.tasks.task import Evaluation, Measure, Questions, Sample, accuracy


class Infilling:
    """Task of texts with gaps."""

    metrics: Mapping[str, Measure] = {
        Metric.infilling_accuracy: accuracy,
        Metric.infilling_similarity: lambda samples: sum(each["similarity"] for each in samples) / len(samples),
        Metric.infilling_loss: lambda samples: (
            -sum(each["logprob"] for each in samples) / sum(each["tokens"] for each in samples)
        ),
    }
    usual: Sequence[str] = [*metrics]

    def __init__(self, cfg: InfillingConfig) -> None:
        self.cfg = cfg

    def evaluate(self, evaluation: Evaluation) -> list[Sample]:
        """Fill each gap, and score the text that was there."""
        gaps, rows, new_tokens = self._asked(evaluation)
        contexts = [row.context for row in rows]
        scores = evaluation.model.score(rows, evaluation.label)
        texts = self._filled(evaluation, gaps, contexts, new_tokens)
        return [
            {
                "context": evaluation.prompts.decode(context),
                "middle": gap.middle,
                "generated": text,
                **_judged(text, gap.middle),
                "logprob": sum(score.logprobs),
                "tokens": len(score.logprobs),
            }
            for context, gap, text, score in zip(contexts, gaps, texts, scores, strict=True)
        ]

    def check(self, questions: Questions) -> None:
        """Make each prompt."""
        self._asked(questions)

    def _asked(self, questions: Questions) -> tuple[list[Gap], list[Continuation], int]:
        """Make the gap of each example, its prompt with what was there, and count the tokens that may fill it."""
        infiller, prompts = self._infiller(questions), questions.prompts
        given = self.cfg.generation_kwargs.max_new_tokens
        most = prompts.max_seq_len - SENTINELS - (given is None)  # and the end

        def middle(example: Example, _: str) -> list[int]:
            if len(ids := self._middle(infiller, example)) > most:
                left = f"{len(ids)} tokens in max_seq_len, {prompts.max_seq_len}, leave no room for the special tokens"
                raise UserError(f"{self.cfg.answer_key}: {left} of a prompt; allowed: at most {most}")
            return ids

        middles = questions.made(lambda example, _: "", middle)
        longest = max(len(self._middle(infiller, example)) for example in questions.drawn_from)
        new_tokens = given or longest + 1
        prompts.check_new_tokens(given, new_tokens, SENTINELS)
        room = prompts.max_seq_len - max(longest, new_tokens)

        def solved(example: Example, preceding: str) -> str:
            gap = self._gap(example)
            return prompts.question(gap.prefix, preceding) + gap.middle + gap.suffix

        def gap_behind(example: Example, preceding: str) -> Gap:
            gap = self._gap(example)
            return Gap(preceding + prompts.question(gap.prefix, preceding), gap.middle, gap.suffix)

        gaps = questions.made(solved, gap_behind)
        contexts = questions.made(
            solved, lambda example, preceding: _context(infiller, gap_behind(example, preceding), room)
        )
        return gaps, [Continuation(*each) for each in zip(contexts, middles, strict=True)], new_tokens

    def _infiller(self, questions: Questions) -> Infiller:
        asked = {f"{FIM}.format": self.cfg.fim_format, f"{FIM}.sentinels": self.cfg.fim_sentinels}
        given = {name: value for name, value in asked.items() if value is not None}
        return Infiller(questions.prompts.tokenizer, "the model", {**questions.recipe, **given})

    def _gap(self, example: Example) -> Gap:
        cfg = self.cfg
        if cfg.answer_key in example or cfg.text_key not in example:
            return Gap(*(text_at(example, key) for key in (cfg.prefix_key, cfg.answer_key, cfg.suffix_key)))
        gap = next(lines_taken_out([text_at(example, cfg.text_key)]), None)
        if gap is None:
            raise UserError(f"{cfg.text_key}: fewer than three lines, so that none can be taken out")
        return gap

    def _middle(self, infiller: Infiller, example: Example) -> list[int]:
        """Encode what was in a gap."""
        if not (ids := infiller.ids(self.cfg.answer_key, self._gap(example).middle)):
            raise UserError(f"{self.cfg.answer_key}: has no token")
        return ids

    def _filled(
        self, evaluation: Evaluation, gaps: Sequence[Gap], contexts: Sequence[list[int]], new_tokens: int
    ) -> list[str]:
        """Let the model fill the gaps; of a gap of one line it need not write more than a line."""
        tokenizer = evaluation.prompts.tokenizer

        def prompt(number: int, ids: list[int]) -> Prompt:
            one_line = is_one_line(gaps[number].middle)

            def ended(new: list[int]) -> bool:
                if tokenizer.has_ended(ids, new, ()):
                    return True
                return one_line and "\n" in tokenizer.text_after(ids, new).lstrip("\n")

            return Prompt(ids, new_tokens, ended, drawn(self.cfg.generation_kwargs, f"{self.cfg.label} {number}"))

        prompts = [prompt(number, ids) for number, ids in enumerate(contexts)]
        found = evaluation.model.complete(prompts, evaluation.label)
        return [tokenizer.text_after(ids, new) for ids, new in zip(contexts, found, strict=True)]


def _context(infiller: Infiller, gap: Gap, room: int) -> list[int]:
    ids: list[int] = infiller.prompt(gap.prefix, gap.suffix, room).tolist()
    return ids


def _judged(text: str, middle: str) -> Sample:
    """Compare a text with what was in the gap, blanks at their ends aside."""
    answer, right = (first_line(text) if is_one_line(middle) else text).strip(), middle.strip()
    return {"answer": answer, "correct": answer == right, "similarity": edit_similarity(answer, right)}
