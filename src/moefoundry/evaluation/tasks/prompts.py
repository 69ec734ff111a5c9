"""Prompts of tasks, text for text and token for token those of LLM Foundry 0.22.

A prompt is ``prompt_string``, then solved examples, then the example's own question. The solved ones are drawn for one
example after the other from one generator, so that each has others, always the same. What comes before the question is
tokenized by itself, with the tokens that the tokenizer adds to a text (such as a beginning-of-text token).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from moefoundry.config import UserError
from moefoundry.config.schema_tasks import TaskConfig
from moefoundry.evaluation.batched import Continuation
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.evaluation.tasks.examples import Example


@dataclass(frozen=True)
class Prompts:
    """Makes a task's prompts.

    Attributes:
        cfg: Texts between the parts of a prompt.
        tokenizer: The model's own.
        max_seq_len: Tokens of a sequence at most; the beginning of a longer one is cut off.
    """

    cfg: TaskConfig
    tokenizer: PromptTokenizer
    max_seq_len: int

    @cached_property
    def blank_before_answer(self) -> bool:
        """Tell if an answer is tokenized with the blank before it: byte-level vocabularies have such tokens."""
        return len(self.encode(" a")) == 1

    def with_blank(self, answer: str) -> str:
        """Put the blank before an answer where the tokenizer wants it."""
        return f" {answer}" if self.blank_before_answer and not answer.startswith(" ") else answer

    def question(self, text: str, preceding: str) -> str:
        """Write a question, up to where its answer begins."""
        delimiter = self.cfg.example_delimiter if preceding else ""
        return f"{delimiter}{self.cfg.prelimiter}{text}{self.cfg.continuation_delimiter}"

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Encode a text; with ``special``, as the beginning of a sequence.

        Raises:
            UserError: It is no valid text.
        """
        backend: Tokenizer = self.tokenizer.backend
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=special).ids
        except (UnicodeError, TypeError):
            raise UserError(f"{text[:60]!a}: not UTF-8 text") from None
        return ids

    def decode(self, ids: list[int]) -> str:
        """Give the text of tokens, special ones included."""
        text: str = self.tokenizer.backend.decode(ids, skip_special_tokens=False)
        return text

    def context(self, preceding: str, question: str, strip: bool = True) -> list[int]:
        """Tokenize what comes before the question, and the question; ``strip`` takes blanks from its end."""
        ids = self.encode(preceding, special=True)
        if len(ids) > 1 and ids[-1] in self.tokenizer.end_ids:  # some tokenizers end every text
            ids = ids[:-1]
        return ids + self.encode(question.rstrip() if strip and self.cfg.strip_dataset else question)

    def continuation(self, context: list[int], context_key: str, answer: str, key: str) -> Continuation:
        """Join a context, cut to what fits, and an answer, which stands at ``key``.

        Raises:
            UserError: The answer has no token, or leaves no room for a token before it.
        """
        tokens = self.encode(answer)
        if not tokens:
            raise UserError(f"{key}: the answer {answer!r} has no token")
        if len(tokens) >= self.max_seq_len:
            message = f"an answer of {len(tokens)} tokens does not fit in max_seq_len, {self.max_seq_len}"
            raise UserError(f"{message}; allowed at {key}: at most {self.max_seq_len - 1}")
        return Continuation(self.fitted(context, context_key, len(tokens)), tokens)

    def check_new_tokens(self, given: int | None, new_tokens: int, others: int = 1) -> None:
        """Check that new tokens fit behind the ``others`` that a prompt has at least.

        Args:
            given: ``max_new_tokens`` of the task.
            new_tokens: Tokens that it stands for.
            others: Tokens before them.

        Raises:
            UserError: They do not.
        """
        if new_tokens + others > self.max_seq_len:
            said = "null" if given is None else given
            message = f"generation_kwargs.max_new_tokens: {said}, and {new_tokens} new tokens do not fit in max_seq_len"
            raise UserError(f"{message}, {self.max_seq_len}; allowed: at most {self.max_seq_len - others}")

    def fitted(self, context: list[int], key: str, room: int) -> list[int]:
        """Cut the beginning of a context, whose question stands at ``key``, so that ``room`` more tokens fit.

        Raises:
            UserError: It has no token.
        """
        if not context:
            empty = f"there is no token before the answer: {key} is empty"
            raise UserError(f"{empty}, and neither prompt_string nor prelimiter gives one")
        return context[-(self.max_seq_len - room) :]


def preceding_texts(count: int, cfg: TaskConfig, num_fewshot: int, solved: Callable[[int, str], str]) -> Iterator[str]:
    """Yield what comes before the question of each example.

    Args:
        count: Number of all examples of the task.
        cfg: Has the first text, and the seed of the draws.
        num_fewshot: Solved examples before each.
        solved: Writes the example of a number with its answer, behind a text.
    """
    draws = random.Random(cfg.fewshot_random_seed)
    for index in range(count):
        text = cfg.prompt_string
        if num_fewshot:
            for other in _drawn(count, num_fewshot, index, draws):
                text += solved(other, text)
        yield text


def _drawn(count: int, wanted: int, index: int, draws: random.Random) -> set[int]:
    """Draw examples other than ``index``. They come in the order of the set, as LLM Foundry has them."""
    wanted = min(count - 1, wanted)
    drawn = set(draws.sample(range(count), wanted))
    if index in drawn:
        drawn.remove(index)
        if len(drawn) >= count - 1:
            return drawn
        other = draws.choice(range(count))
        while other in drawn or other == index:
            other = draws.choice(range(count))
        drawn.add(other)
    return drawn


def stripped(example: Example) -> Example:
    """Take blanks from both ends of an example's texts; those in lists stay."""
    return {name: value.strip() if isinstance(value, str) else value for name, value in example.items()}
