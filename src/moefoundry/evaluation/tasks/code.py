"""Code tasks such as HumanEval, whose programs run in the sandbox; each rank runs its share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch.distributed as dist

from moefoundry.checkpoint.ranks import from_every_rank, rank, together
from moefoundry.config import UserError
from moefoundry.config.schema_tasks import CodeTaskConfig, Metric
from moefoundry.evaluation.code_completion import complete_problems
from moefoundry.evaluation.code_tasks import (
    BROKEN,
    Problem,
    Result,
    by_task_id,
    check_allowed,
    check_tests,
    pass_at_k,
    run_samples,
)
from moefoundry.evaluation.code_tasks import Sample as Completion
from moefoundry.evaluation.generation import Sampling
from moefoundry.evaluation.sandbox.run import Limits, statement
from moefoundry.evaluation.tasks.examples import Example, text_at
from moefoundry.evaluation.tasks.task import Evaluation, Measure, Questions, Sample

MAX_NEW_TOKENS = 512


class CodeEvaluation:
    """Task of functions to be completed.

    Raises:
        UserError: Execution is not allowed, or the draws do not suffice for pass@k.
    """

    def __init__(self, cfg: CodeTaskConfig) -> None:
        check_allowed(cfg.allow_code_execution)
        if cfg.generations_per_sample < max(cfg.pass_at_k, default=1):
            raise UserError(f"generations_per_sample={cfg.generations_per_sample}: below pass_at_k={cfg.pass_at_k}")
        if cfg.generations_per_sample > 1 and not cfg.generation_kwargs.do_sample:
            raise UserError("generation_kwargs.do_sample=false: all generations of a problem would be the same")
        self.cfg = cfg
        self.metrics: Mapping[str, Measure] = {
            Metric.code_accuracy: partial(_estimate, 1),
            **{f"pass@{k}": partial(_estimate, k) for k in sorted({1, *cfg.pass_at_k})},
        }
        self.usual: Sequence[str] = [*self.metrics]

    def evaluate(self, evaluation: Evaluation) -> list[Sample]:
        """Complete each problem, and run its test."""
        given = self.cfg.generation_kwargs
        problems, contexts = self._asked(evaluation)
        completions = complete_problems(
            evaluation.model,
            evaluation.prompts.tokenizer,
            [*problems.values()],
            contexts,
            samples=self.cfg.generations_per_sample,
            sampling=Sampling(given.temperature if given.do_sample else 0, given.top_k, given.top_p, given.seed),
            max_new_tokens=given.max_new_tokens or MAX_NEW_TOKENS,
            label=evaluation.label,
        )
        results = self._run(problems, completions)
        if rank() == 0:
            say_what_is_broken(results)
        return [{**asdict(result), "correct": result.passed} for result in results]

    def check(self, questions: Questions) -> None:
        """Make each prompt, and read each test."""
        self._asked(questions)

    def _asked(self, questions: Questions) -> tuple[Mapping[str, Problem], list[list[int]]]:
        """Make the problems, by their names, and the prompt of each."""
        prompts, given = questions.prompts, self.cfg.generation_kwargs.max_new_tokens
        new_tokens = given or MAX_NEW_TOKENS

        def solved(example: Example, preceding: str) -> str:
            return prompts.question(text_at(example, "prompt"), preceding) + text_at(example, "canonical_solution")

        def context(example: Example, preceding: str) -> list[int]:
            question = prompts.question(text_at(example, "prompt"), preceding)
            return prompts.fitted(prompts.context(preceding, question), "prompt", new_tokens)

        problems = questions.made(lambda example, _: "", lambda example, _: _problem(example))
        named = by_task_id(problems, self.cfg.dataset_uri)
        prompts.check_new_tokens(given, new_tokens)
        return named, questions.made(solved, context)

    def _run(self, problems: Mapping[str, Problem], completions: Sequence[Completion]) -> list[Result]:
        world = dist.get_world_size() if dist.is_initialized() else 1
        with together():
            mine = run_samples(
                problems,
                completions[rank() :: world],
                allow_code_execution=self.cfg.allow_code_execution,
                limits=Limits(seconds=self.cfg.timeout),
                workers=self.cfg.workers,
            )
        shares = [iter(share) for share in from_every_rank(mine)]
        return [next(shares[number % world]) for number in range(len(completions))]


def _problem(example: Example) -> Problem:
    problem = Problem(**{name: text_at(example, name) for name in Problem.__dataclass_fields__})
    check_tests([problem])
    return problem


def _estimate(k: int, samples: Sequence[Sample]) -> float:
    results = [Result(each["task_id"], each["completion"], each["passed"], each["result"]) for each in samples]
    return pass_at_k(results, [k])[f"pass@{k}"]


def say_what_is_open() -> None:
    """Name on standard error what the sandbox does not stop on this machine."""
    print(*(line for line in statement().splitlines() if not line.startswith("stopped")), sep="\n", file=sys.stderr)


def say_what_is_broken(results: Iterable[Result]) -> None:
    """Name on standard error the problems whose prompts fail, so that no sample of them can pass."""
    broken = {result.task_id: result.result for result in results if result.result.startswith(BROKEN)}
    for name, result in broken.items():
        print(f"warning: {name}: {result}; none of its samples can pass", file=sys.stderr, flush=True)
