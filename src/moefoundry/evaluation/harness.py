"""A model as EleutherAI's lm-evaluation-harness (0.4.13, extra ``eval``) asks it.

Every rank runs the harness with all requests; the forward passes are divided among the ranks below it. Tokens, windows
and stops follow the harness's own model for ``transformers``, so that both give the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moefoundry.config import UserError
from moefoundry.data.tokenizer import declared_token
from moefoundry.evaluation.batched import BatchedModel, Continuation, Prompt
from moefoundry.evaluation.generation import Sampling
from moefoundry.evaluation.prompts import PromptTokenizer

MAX_NEW_TOKENS = 256  # of a task that names no number


class HarnessModel(TemplateLM):
    """Answers the harness's requests.

    Args:
        model: The model.
        tokenizer: The model's own.
        directory: Directory of the tokenizer; names its special tokens.
        max_length: Tokens of a sequence at most; the beginning of a longer one is cut off.

    Raises:
        UserError: The tokenizer has no end-of-text token.
    """

    def __init__(self, model: BatchedModel, tokenizer: PromptTokenizer, directory: Path, max_length: int) -> None:
        super().__init__()
        self.batched = model
        self.texts = tokenizer
        self.max_length = max_length
        ids = [_id_of(directory, tokenizer, key) for key in ("bos_token", "eos_token")]
        if ids[1] is None:
            raise UserError(f"{directory}: the tokenizer has no eos_token, which the harness needs")
        self.begin, self.end = ids[1] if ids[0] is None else ids[0], ids[1]

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; by default with the tokens that the tokenizer adds, unless it begins with them."""
        backend = self.texts.backend
        if add_special_tokens is None:
            prefix = backend.decode([self.begin], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        ids: list[int] = backend.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _texts, context, tokens in requests:
            room = self.max_length + 1 - len(tokens)  # the last token is not read
            if room < 1:
                raise UserError(f"a continuation of {len(tokens)} tokens does not fit in {self.max_length}")
            rows.append(Continuation(context[-room:], tokens))
        scores = self.batched.score(rows, "log-likelihoods")
        return [(sum(score.logprobs), score.likeliest == row.tokens) for row, score in zip(rows, scores, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Give the log-likelihood of each text, in windows of at most ``max_length`` tokens."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(self.tok_encode(text), self.begin, self.max_length, 1)
            ]
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._loglikelihood_tokens([(None, *window) for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to its stops, an end token or its number of tokens."""
        eos = self.texts.backend.decode([self.end], skip_special_tokens=False)
        prompts, stops = [], []
        for number, (context, given) in enumerate(request.args for request in requests):
            kwargs = normalize_gen_kwargs(given, MAX_NEW_TOKENS)
            until, new_tokens = handle_stop_sequences(kwargs.get("until"), eos=eos), kwargs["max_gen_toks"]
            if new_tokens >= self.max_length:
                raise UserError(f"{new_tokens} new tokens leave no room for a prompt in {self.max_length}")
            ids = self.tok_encode(context)[-(self.max_length - new_tokens) :]
            temperature = kwargs.get("temperature", 0.0) if kwargs.get("do_sample") else 0.0
            draws = Sampling(temperature, kwargs.get("top_k"), kwargs.get("top_p", 1.0), seed=number)
            stops.append(until)
            prompts.append(Prompt(ids, new_tokens, self._ends(ids, until), draws.choice()))
        found = zip(prompts, self.batched.complete(prompts, "texts"), stops, strict=True)
        return [
            postprocess_generated_text(self.texts.text_after(prompt.tokens, new), until, None)
            for prompt, new, until in found
        ]

    def _ends(self, ids: list[int], until: list[str]) -> Any:
        return lambda new: self.texts.has_ended(ids, new, [stop for stop in until if stop])


def run_harness(
    model: HarnessModel, tasks: Sequence[str], include: Path | None, *, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """Evaluate tasks of the harness; every rank calls it.

    Args:
        model: The model.
        tasks: Names of tasks and groups.
        include: Directory of further task files.
        num_fewshot: Solved examples before each; None is the task's number.
        limit: Examples of each task at most.

    Returns:
        The harness's results, with ``samples`` by task; empty on other ranks than the first.

    Raises:
        UserError: A task is not known, or its data cannot be had.
    """
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    if set(tasks) - set(manager.all_tasks) and include is not None:
        manager = TaskManager(include_path=str(include))  # which takes seconds: the harness has thousands
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise UserError(f"harness={unknown[0]}: no such task; --harness-include names a directory of further ones")
    try:
        return dict(
            simple_evaluate(
                model,
                tasks=[*tasks],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
            )
            or {}
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f"harness={','.join(tasks)}: its data cannot be had: {error}") from error


def rows_of(results: dict[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Yield task, metric (with the name of its filter) and value."""
    for task, metrics in results.get("results", {}).items():
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and "stderr" not in name and name not in ("alias", "sample_len"):
                yield task, name, float(value)


def write_harness_samples(file: Path, results: dict[str, Any]) -> None:
    """Write the samples of all tasks as JSON Lines, with the name of their task."""
    with file.open("w", encoding="utf-8") as out:
        for task, samples in results.get("samples", {}).items():
            out.writelines(json.dumps({"task": task, **sample}, default=str) + "\n" for sample in samples)


def _id_of(directory: Path, tokenizer: PromptTokenizer, key: str) -> int | None:
    token = declared_token(directory, key)
    found: int | None = None if token is None else tokenizer.backend.token_to_id(token)
    return found
