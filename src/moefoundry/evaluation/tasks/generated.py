"""Generated answers, with or without a chain of thought before them: judged by LLM Foundry's rules."""

from __future__ import annotations

import re
import string
import zlib
from collections.abc import Mapping, Sequence

from moefoundry.config import UserError
from moefoundry.config.schema_tasks import GenerationConfig, GenerationTaskConfig, Metric
from moefoundry.evaluation.batched import Prompt
from moefoundry.evaluation.generation import Choice, Sampling, most_likely
from moefoundry.evaluation.tasks.examples import Example, text_at, wrong
from moefoundry.evaluation.tasks.prompts import Prompts
from moefoundry.evaluation.tasks.task import Evaluation, Measure, Questions, Sample, accuracy

CHAIN = "chain_of_thought"
ALIASES = "aliases"
EXTRA_TOKENS = 10
"""Tokens that a model may spend beyond the longest chain of thought."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))


class GenerationWithAnswers:
    """Task of a generated text, which must begin with one of the answers."""

    metrics: Mapping[str, Measure] = {Metric.exact_match: accuracy}
    usual: Sequence[str] = (Metric.exact_match,)

    def __init__(self, cfg: GenerationTaskConfig) -> None:
        self.cfg = cfg

    def evaluate(self, evaluation: Evaluation) -> list[Sample]:
        """Complete each example, and compare."""
        prompts, cfg = evaluation.prompts, self.cfg
        answers, contexts, new_tokens = self._asked(evaluation)

        def prompt(ids: list[int], number: int) -> Prompt:
            def ended(new: list[int]) -> bool:
                return prompts.tokenizer.has_ended(ids, new, cfg.early_stopping_criteria)

            return Prompt(ids, new_tokens, ended, drawn(cfg.generation_kwargs, f"{cfg.label} {number}"))

        rows = [prompt(ids, number) for number, ids in enumerate(contexts)]
        texts = [
            prompts.tokenizer.text_after(ids, new)
            for ids, new in zip(contexts, evaluation.model.complete(rows, evaluation.label), strict=True)
        ]
        return [
            {"context": prompts.decode(ids), "generated": text, "answers": right, **self._judged(text, right)}
            for ids, text, right in zip(contexts, texts, answers, strict=True)
        ]

    def check(self, questions: Questions) -> None:
        """Make each prompt."""
        self._asked(questions)

    def _asked(self, questions: Questions) -> tuple[list[list[str]], list[list[int]], int]:
        """Make the answers and the prompt of each example, and count the tokens that a completion may have."""
        prompts, cfg = questions.prompts, self.cfg
        answers = questions.made(lambda example, _: "", lambda example, _: self._answers(example))
        thinks = any(CHAIN in example for example in questions.drawn_from)
        longest = self._longest(prompts, questions.drawn_from, thinks)
        new_tokens = cfg.generation_kwargs.max_new_tokens or longest
        prompts.check_new_tokens(cfg.generation_kwargs.max_new_tokens, new_tokens)

        def question(example: Example, preceding: str) -> str:
            return prompts.question(text_at(example, cfg.context_key), preceding)

        def solved(example: Example, preceding: str) -> str:
            return question(example, preceding) + self._response(example, text_at(example, cfg.answer_key), thinks)

        def context(example: Example, preceding: str) -> list[int]:
            tokens = prompts.context(preceding, question(example, preceding))
            return prompts.fitted(tokens, cfg.context_key, new_tokens)

        return answers, questions.made(solved, context), new_tokens

    def _answers(self, example: Example) -> list[str]:
        aliases = example.get(ALIASES) or []
        if not isinstance(aliases, list):
            raise UserError(f"{ALIASES}: {wrong(example, ALIASES)}, not a list of texts")
        return [text_at(example, self.cfg.answer_key), *(str(alias) for alias in aliases)]

    def _response(self, example: Example, answer: str, thinks: bool) -> str:
        return f"{example.get(CHAIN, '')}{self.cfg.cot_delimiter}{answer}" if thinks else answer

    def _longest(self, prompts: Prompts, examples: Sequence[Example], thinks: bool) -> int:
        """Count the tokens that the longest right response takes."""
        responses = [self._response(each, answer, thinks) for each in examples for answer in self._answers(each)]
        longest = max(len(prompts.encode(response, special=True)) for response in responses)
        return max(longest + (EXTRA_TOKENS if self.cfg.cot_delimiter else 0), 1)

    def _judged(self, text: str, answers: Sequence[str]) -> Sample:
        """Take the answer out of a generated text, and compare it with the right ones."""
        text = text[
            : min((at for stop in self.cfg.early_stopping_criteria if (at := text.find(stop)) >= 0), default=None)
        ]
        if self.cfg.cot_delimiter:
            text = text.split(self.cfg.cot_delimiter)[-1]
        clean = normalized if self.cfg.do_normalization else str.strip
        answer = clean(text)
        return {"answer": answer, "correct": any(answer.startswith(clean(right)) for right in answers)}


def drawn(cfg: GenerationConfig, name: str) -> Choice:
    """Make the choice of tokens of one text; its draws follow from the seed and its name alone."""
    if not cfg.do_sample:
        return most_likely
    return Sampling(cfg.temperature, cfg.top_k, cfg.top_p, zlib.crc32(f"{cfg.seed} {name}".encode())).choice()


def normalized(answer: str) -> str:
    """Take case, articles, punctuation and doubled blanks out of an answer."""
    text = answer.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())
