"""Code tasks such as HumanEval: completions of prompts, run against tests in the sandbox, and pass@k.

https://github.com/openai/human-eval gives the problems and the forms of samples and results as JSONL.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.evaluation.sandbox.run import BrokenTestError, Limits, Outcome, SandboxError, run

STOP_SEQUENCES = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Beginnings of what follows the function (Chen et al. 2021, arXiv 2107.03374, section 2.1)."""

BROKEN = "broken"
"""Beginning of the result of a sample whose test could not run."""


@dataclass(frozen=True)
class Problem:
    """A function to be completed, and its test.

    Attributes:
        task_id: Name of the problem, such as ``HumanEval/0``.
        prompt: Beginning of the program: imports, helpers, and the function's signature, maybe with a docstring.
        entry_point: Name of the function.
        canonical_solution: A right completion.
        test: Source that defines ``check(candidate)``.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


@dataclass(frozen=True)
class Sample:
    """A completion of a problem's prompt.

    Attributes:
        task_id: Name of the problem.
        completion: Text behind the prompt, cut or not.
    """

    task_id: str
    completion: str


@dataclass(frozen=True)
class Result:
    """A sample that has been run.

    Attributes:
        task_id: Name of the problem.
        completion: Text that was run, cut at the first stop sequence.
        passed: True if the whole test ran.
        result: ``passed``, or the outcome and the error's last line; the outcome is ``broken`` where the prompt fails.
    """

    task_id: str
    completion: str
    passed: bool
    result: str


def read_problems(path: Path) -> dict[str, Problem]:
    """Read problems from a JSONL file of HumanEval's form; other keys are left out.

    Raises:
        UserError: A line has not that form, or there is none; or two problems have one name.
    """
    problems = [_from_line(Problem, path, number, line) for number, line in _lines(path)]
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return by_task_id(problems, str(path))


def by_task_id(problems: Sequence[Problem], source: str) -> dict[str, Problem]:
    """Map problems by their names; ``source`` is where they were read.

    Raises:
        UserError: Two have one name, so that completions of one would run against the test of the other.
    """
    for name, count in Counter(problem.task_id for problem in problems).items():
        if count > 1:
            raise UserError(f"{source}: task_id: {name!r} names {count} problems; give each a name of its own")
    return {problem.task_id: problem for problem in problems}


def read_samples(path: Path) -> list[Sample]:
    """Read samples, or results, from a JSONL file.

    Raises:
        UserError: A line has not that form.
    """
    return [_from_line(Sample, path, number, line) for number, line in _lines(path)]


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write results as JSONL, one sample a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(result)) + "\n" for result in results)


def cut(completion: str, stops: Iterable[str] = STOP_SEQUENCES) -> str:
    """Return a completion up to the first of ``stops``."""
    return completion[: min((at for stop in stops if (at := completion.find(stop)) >= 0), default=None)]


def run_samples(
    problems: Mapping[str, Problem],
    samples: Iterable[Sample],
    *,
    allow_code_execution: bool = False,
    limits: Limits | None = None,
    workers: int = 1,
) -> list[Result]:
    """Run each sample in a sandbox of its own, several at a time. The results are in the order of the samples.

    Args:
        problems: Problems by ``task_id``.
        samples: Completions of them.
        allow_code_execution: Must be True: what runs was written by a model.
        limits: Limits of each program.
        workers: Programs that run at the same time; more than there are cores costs them their time.

    Raises:
        UserError: It is not allowed, a sample names no problem, a problem's test is broken, or the sandbox does not
            work here.
    """
    check_allowed(allow_code_execution)
    if workers < 1:
        raise UserError(f"workers={workers}: must be at least 1")
    samples = list(samples)
    if unknown := {sample.task_id for sample in samples} - problems.keys():
        raise UserError(f"task_id={min(unknown)}: no such problem")
    check_tests(problems[sample.task_id] for sample in samples)
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(lambda sample: run_sample(problems[sample.task_id], sample.completion, limits), samples))
    finally:
        pool.shutdown(cancel_futures=True)


def check_allowed(allow_code_execution: bool) -> None:
    """Raise a UserError unless ``allow_code_execution`` is True itself."""
    if allow_code_execution is not True:
        raise UserError(
            f"allow_code_execution={allow_code_execution!r}: must be True, as programs written by a model are run; "
            "docs/evaluation.md says what the sandbox stops"
        )


def run_sample(problem: Problem, completion: str, limits: Limits | None = None) -> Result:
    """Run one completion, cut at the first stop sequence, against the test of its problem.

    Where the prompt itself fails, such as by an import, each completion of it does.

    Raises:
        SandboxError: The sandbox does not work here.
    """
    completion = cut(completion)
    program, prelude = problem.prompt + completion, prelude_of(problem)
    try:
        ending = run(program, _whole_test(problem), problem.entry_point, prelude=prelude, limits=limits)
    except BrokenTestError as error:
        return Result(problem.task_id, completion, False, f"{BROKEN}: {error}")
    except SandboxError as error:
        raise SandboxError(f"{problem.task_id}: {error}") from error
    passed = ending.outcome is Outcome.PASSED
    return Result(problem.task_id, completion, passed, "passed" if passed else f"{ending.outcome}: {ending.error}")


@cache
def prelude_of(problem: Problem) -> str:
    """Give what a problem's test may use: the prompt's imports and helpers.

    A function of which the prompt has the signature alone gets an empty body: the test calls the program's instead.
    """
    if not _fault(problem.prompt):
        return problem.prompt
    last = next((line for line in reversed(problem.prompt.splitlines()) if line.strip()), "")
    indent = last[: len(last) - len(last.lstrip())]
    completed = f"{problem.prompt}\n{indent}    pass\n"
    return problem.prompt if _fault(completed) else completed


def check_tests(problems: Iterable[Problem]) -> None:
    """Check, without running anything, that tests and what they may use are valid Python.

    Raises:
        SandboxError: Those of a problem are not; it is named.
    """
    for problem in problems:
        if fault := _fault(prelude_of(problem)) or _fault(_whole_test(problem)):
            raise SandboxError(f"{problem.task_id}: the test is broken: {fault}")


def _whole_test(problem: Problem) -> str:
    return f"{problem.test}\ncheck({problem.entry_point})\n"


@cache
def _fault(source: str) -> str:
    """Describe why a text is no Python; empty if it is."""
    with warnings.catch_warnings(action="ignore"):
        try:
            compile(source, "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def estimate_pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate pass@k without bias, ``1 - C(n - c, k) / C(n, k)``, as a product that does not overflow.

    It is the chance that k of the n samples, drawn without replacement, hold a right one (arXiv 2107.03374, figure 3).

    Args:
        n: Samples.
        c: Right ones among them.
        k: Samples that may be tried, at most n.

    Raises:
        ValueError: They are out of range.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, c={c}, k={k}: must have 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_at_k(results: Iterable[Result], ks: Iterable[int] = (1, 10, 100)) -> dict[str, float]:
    """Average the estimate over problems, for each k of which every problem has as many samples.

    Returns:
        ``{"pass@1": ...}``, from 0 to 1.
    """
    passed = defaultdict(list)
    for result in results:
        passed[result.task_id].append(result.passed)
    fewest = min(map(len, passed.values()), default=0)
    return {
        f"pass@{k}": sum(estimate_pass_at_k(len(each), sum(each), k) for each in passed.values()) / len(passed)
        for k in ks
        if k <= fewest
    }


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _from_line(kind: Any, path: Path, number: int, line: str) -> Any:
    try:
        fields = json.loads(line)
        texts = {name: fields[name] for name in kind.__dataclass_fields__}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: line {number}: no JSON object: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: line {number}: lacks {error}") from None
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise UserError(f"{path}: line {number}: {wrong[0]}: must be a string")
    return kind(**texts)
