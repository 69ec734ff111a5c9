"""A model's completions of code tasks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from moefoundry.evaluation.batched import BatchedModel, Prompt
from moefoundry.evaluation.code_tasks import STOP_SEQUENCES, Problem, Sample, cut
from moefoundry.evaluation.generation import Sampling
from moefoundry.evaluation.prompts import PromptTokenizer


def complete_problems(
    model: BatchedModel,
    tokenizer: PromptTokenizer,
    problems: Sequence[Problem],
    contexts: Sequence[list[int]],
    *,
    samples: int = 1,
    sampling: Sampling | None = None,
    max_new_tokens: int = 512,
    label: str = "samples",
) -> list[Sample]:
    """Complete each problem ``samples`` times, each up to an end token or the first stop sequence.

    The draws of a sample follow from the seed, the problem's name and the sample's number alone. Every rank calls it,
    and gets all samples, those of a problem one after the other.

    Args:
        model: The model.
        tokenizer: The model's own.
        problems: Problems to complete.
        contexts: Tokens to continue for each; those of its prompt are the last.
        samples: Completions of each; more than one need a temperature above 0.
        sampling: Draws; the most likely tokens if None.
        max_new_tokens: Tokens of a completion at most.
        label: Name of the progress bar.
    """
    sampling = sampling or Sampling(temperature=0)
    pairs = [pair for pair in zip(problems, contexts, strict=True) for _ in range(samples)]

    def prompt(problem: Problem, ids: list[int], number: int) -> Prompt:
        seed = zlib.crc32(f"{sampling.seed} {problem.task_id} {number}".encode())
        choose = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed).choice()
        return Prompt(ids, max_new_tokens, lambda new: tokenizer.has_ended(ids, new, STOP_SEQUENCES), choose)

    prompts = [prompt(*pair, number % samples) for number, pair in enumerate(pairs)]
    return [
        Sample(problem.task_id, cut(tokenizer.text_after(ids, new)))
        for (problem, ids), new in zip(pairs, model.complete(prompts, label), strict=True)
    ]
