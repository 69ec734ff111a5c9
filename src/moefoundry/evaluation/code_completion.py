"""A model's completions of code tasks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from moefoundry.evaluation.code_tasks import Problem, Sample, cut
from moefoundry.evaluation.generation import Sampling, generate
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.model.transformer import MoETransformer


def complete_problems(
    model: MoETransformer,
    tokenizer: PromptTokenizer,
    problems: Iterable[Problem],
    *,
    samples: int = 1,
    sampling: Sampling | None = None,
    max_new_tokens: int = 512,
) -> Iterator[Sample]:
    """Yield ``samples`` completions of each problem, each up to an end token or the first stop sequence.

    The draws of a sample follow from the seed, the problem's name and the sample's number alone.

    Args:
        model: In evaluation mode, whole on one device.
        tokenizer: The model's own.
        problems: Problems to complete.
        samples: Completions of each; more than one needs a temperature above 0.
        sampling: Draws; the most likely tokens if None.
        max_new_tokens: Tokens of a completion at most.

    Raises:
        UserError: A prompt has no token.
    """
    sampling = sampling or Sampling(temperature=0)
    device = next(model.parameters()).device
    for problem in problems:
        prompt_ids = tokenizer.encode(problem.prompt)
        for number in range(samples):
            seed = zlib.crc32(f"{sampling.seed} {problem.task_id} {number}".encode())
            choose = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed).choice()
            text = ""
            new_ids = generate(model, prompt_ids.to(device), max_new_tokens, choose)
            for piece in tokenizer.decode_stream(prompt_ids, new_ids):
                text += piece
                if cut(text) != text:
                    break
            yield Sample(problem.task_id, cut(text))
