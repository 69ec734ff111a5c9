"""Code tasks: HumanEval's solutions pass and others do not, and pass@k is what counting every draw gives."""

import json
import os
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path

import pytest

from moefoundry.config.errors import UserError
from moefoundry.evaluation import code_tasks
from moefoundry.evaluation.code_tasks import (
    Problem,
    Result,
    Sample,
    cut,
    estimate_pass_at_k,
    pass_at_k,
    read_problems,
    read_samples,
    run_samples,
    write_results,
)
from moefoundry.evaluation.sandbox.run import Limits, SandboxError

PATIENT = Limits(seconds=30)
DATA = "MOEFOUNDRY_EVAL_DATA"
TASK = Problem(
    "T/0",
    'def add(a, b):\n    """Sum."""\n',
    "add",
    "    return a + b\n",
    "def check(candidate):\n    assert candidate(1, 2) == 3\n",
)


@pytest.fixture(scope="module")
def human_eval() -> dict[str, Problem]:
    path = Path(os.environ.get(DATA, Path(__file__).parents[3] / "shared/data/eval")) / "human_eval.jsonl"
    if not path.is_file():
        pytest.skip(f"{path}: HumanEval is not there; {DATA} names the directory that holds human_eval.jsonl")
    return read_problems(path)


def share_passed(problems: dict[str, Problem], completions: dict[str, str]) -> float:
    samples = [Sample(*item) for item in completions.items()]
    results = run_samples(problems, samples, allow_code_execution=True, limits=PATIENT, workers=2)
    return sum(result.passed for result in results) / len(results)


def check_solutions(problems: dict[str, Problem]) -> None:
    right = {name: problem.canonical_solution for name, problem in problems.items()}
    assert share_passed(problems, right) == 1
    later = "\ndef more():\n    exit()\n\nprint(more())\n"
    assert share_passed(problems, {name: text + later for name, text in right.items()}) == 1
    assert share_passed(problems, dict.fromkeys(problems, "    return None\n")) == 0
    assert share_passed(problems, dict.fromkeys(problems, "    raise SystemExit(0)\n")) == 0


def test_some_solutions_of_human_eval(human_eval: dict[str, Problem]) -> None:
    chosen = [f"HumanEval/{number}" for number in (0, 32, 33, 38, 103, 129, 162)]  # those with odd tests among them
    check_solutions({name: human_eval[name] for name in chosen})


def test_solutions_of_the_quickstarts_functions() -> None:
    problems = read_problems(Path(__file__).parents[2] / "configs" / "tasks" / "functions.jsonl")
    right = {name: problem.canonical_solution for name, problem in problems.items()}
    assert share_passed(problems, right) == 1
    assert share_passed(problems, dict.fromkeys(problems, "    pass\n")) == 0


@pytest.mark.slow
def test_all_solutions_of_human_eval(human_eval: dict[str, Problem]) -> None:
    assert len(human_eval) == 164
    check_solutions(human_eval)
    others = [*human_eval.values()][1:] + [*human_eval.values()][:1]
    swapped = {name: other.canonical_solution for name, other in zip(human_eval, others, strict=True)}
    assert share_passed(human_eval, swapped) == 0


def test_results_are_in_order_and_are_kept(tmp_path: Path) -> None:
    texts = ["    return a + b\n\ndef main(): pass", "    return a - b\n", "    while True: pass\n", "    return 1 +\n"]
    results = run_samples(
        {"T/0": TASK},
        [Sample("T/0", text) for text in texts],
        allow_code_execution=True,
        limits=Limits(seconds=2),
        workers=2,
    )
    assert [result.passed for result in results] == [True, False, False, False]
    assert results[0].completion == "    return a + b\n"
    passed, failed, endless = (result.result for result in results[:3])
    assert (passed, failed) == ("passed", "failed: AssertionError")
    assert endless in ("timeout: more than 2 s", "timeout: CPU time is used up")  # whichever limit comes first
    assert results[3].result.startswith("failed: SyntaxError")
    write_results(tmp_path / "results.jsonl", results)
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").open()][1] == {
        "task_id": "T/0",
        "completion": "    return a - b\n",
        "passed": False,
        "result": "failed: AssertionError",
    }
    assert read_samples(tmp_path / "results.jsonl")[2] == Sample("T/0", texts[2])


@pytest.mark.parametrize("allowed", [False, None, 1, "true"])
def test_nothing_runs_unless_allowed(allowed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tasks, "run", lambda *args, **kwargs: pytest.fail("a program was run"))
    with pytest.raises(UserError, match=f"allow_code_execution={allowed!r}: must be True"):
        run_samples({"T/0": TASK}, [Sample("T/0", "")], allow_code_execution=allowed)  # type: ignore[arg-type]


def test_bad_files_and_arguments(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    for text, message in (
        ("", "holds no problem"),
        ("\n{", "line 2: no JSON object"),
        ("[1]", "line 1: no JSON object"),
        ("[" * 100_000, "line 1: no JSON object"),
        ('{"task_id": "a"}', "line 1: lacks 'prompt'"),
        (json.dumps(dict.fromkeys(Problem.__dataclass_fields__, 3)), "line 1: task_id: must be a string"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_problems(path)
    with pytest.raises(UserError, match="task_id=T/9: no such problem"):
        run_samples({"T/0": TASK}, [Sample("T/9", "")], allow_code_execution=True)
    broken = Problem("T/1", "def f(:", "f", "", "")
    with pytest.raises(SandboxError, match="T/1: the test is broken: SyntaxError"):
        run_samples({"T/1": broken}, [Sample("T/1", "")], allow_code_execution=True)
    with pytest.raises(UserError, match="workers=0"):
        run_samples({"T/0": TASK}, [], allow_code_execution=True, workers=0)


def test_two_problems_of_one_name_are_refused(tmp_path: Path) -> None:
    other = replace(TASK, prompt="def twice(a):\n", entry_point="twice")
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(vars(each)) + "\n" for each in (TASK, replace(TASK, task_id="T/1"), other)))
    with pytest.raises(UserError, match=r"problems\.jsonl: task_id: 'T/0' names 2 problems; give each a name"):
        read_problems(path)


def test_stop_sequences() -> None:
    assert cut("    return 1\n") == "    return 1\n"
    function = "    if a:\n        return 1\n    # no\n"
    assert cut(function + "\nif b:\n    pass\nprint(1)") == function
    assert cut("    x = 1\nclass A: pass\ndef f(): pass") == "    x = 1"


def test_pass_at_k_counts_every_draw() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = [*combinations([True] * c + [False] * (n - c), k)]
                assert estimate_pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    exact = 1 - comb(190, 100) / comb(200, 100)
    assert estimate_pass_at_k(200, 10, 100) == pytest.approx(exact, abs=1e-12)
    assert 0 < estimate_pass_at_k(100_000, 1, 1) < 2e-5
    for n, c, k in ((3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="must have"):
            estimate_pass_at_k(n, c, k)


def test_pass_at_k_is_averaged_over_problems() -> None:
    passed = {"a": [True, False, False], "b": [False, False, False, False]}
    results = [Result(name, "", each, "") for name, values in passed.items() for each in values]
    assert pass_at_k(results, (1, 2, 4)) == {"pass@1": pytest.approx(1 / 6), "pass@2": pytest.approx(1 / 3)}
    assert pass_at_k([]) == {}


BARE = [
    "from typing import List\ndef f(xs: List[int]) -> List[int]:\n",
    "def f(\n    xs,\n):",
    "def f(xs):\n    # Negates.\n",
    "def helper(xs):\n    return xs\n\n@staticmethod\ndef f(xs):  # as in MBPP\n\n",
]


@pytest.mark.parametrize("prompt", BARE)
def test_a_prompt_may_be_a_bare_signature(prompt: str) -> None:
    right = "\n    return [-x for x in xs]\n"
    problem = Problem("T/1", prompt, "f", right, "def check(candidate):\n    assert candidate([1]) == [-1]\n")
    samples = [Sample("T/1", right), Sample("T/1", "\n    return xs\n")]
    results = run_samples({"T/1": problem}, samples, allow_code_execution=True, limits=PATIENT)
    assert [result.result for result in results] == ["passed", "failed: AssertionError"]


def test_helpers_of_a_prompt_are_there_for_the_test() -> None:
    prompt = "import math\n\ndef negated(x):\n    return -x\n\ndef f(x):\n"
    test = "def check(candidate):\n    assert candidate(1) == negated(1) == -math.floor(1.5)\n"
    samples = [Sample("T/1", "    return -x\n"), Sample("T/1", "    return x\n")]
    problems = {"T/1": Problem("T/1", prompt, "f", "", test)}
    results = run_samples(problems, samples, allow_code_execution=True, limits=PATIENT)
    assert [result.passed for result in results] == [True, False]


@pytest.mark.parametrize(
    "changes", [{"test": "def check(candidate)\n    pass\n"}, {"prompt": "def f(:"}, {"test": "\0"}], ids=str
)
def test_a_broken_test_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]) -> None:
    monkeypatch.setattr(code_tasks, "run", lambda *args, **kwargs: pytest.fail("a program was run"))
    problems = {"T/0": TASK, "T/1": replace(TASK, task_id="T/1", **changes)}
    with pytest.raises(SandboxError, match=r"T/1: the test is broken: (SyntaxError|ValueError): "):
        run_samples(problems, [Sample("T/0", ""), Sample("T/1", "")], allow_code_execution=True)


def test_no_prompt_of_human_eval_is_changed_for_its_test(human_eval: dict[str, Problem]) -> None:
    code_tasks.check_tests(human_eval.values())
    assert all(code_tasks.prelude_of(problem) == problem.prompt for problem in human_eval.values())


def test_a_prompt_that_fails_loses_no_other_sample() -> None:
    """As one that imports what the sandbox has not; every program of it fails, too."""
    problems = {"T/0": TASK, "T/1": replace(TASK, task_id="T/1", prompt="import nowhere\n" + TASK.prompt)}
    samples = [Sample(name, TASK.canonical_solution) for name in ("T/1", "T/0")]
    results = run_samples(problems, samples, allow_code_execution=True, limits=PATIENT)
    error = "the test is broken: ModuleNotFoundError: No module named 'nowhere'"
    assert [result.result for result in results] == [f"broken: {error}", "passed"]
