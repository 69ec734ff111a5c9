"""What a person is left with at the end: plots, a completion and a command."""

import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from moefoundry.config import Recipe, load_recipe, split_arguments
from tests.distributed import captured_output, run_distributed
from tests.train.runs import finished, run_recipe

PROMPT = "def first(value):"
REPORT = f'callbacks.report={{prompt: "{PROMPT}", max_new_tokens: 8}}'


def train_from_command_line(arguments: Sequence[str]) -> tuple[int, list[str]]:
    from moefoundry.cli.main import main

    sys.argv = ["scripts/train.py", *arguments]
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, texts


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_report_and_the_command_it_prints(
    tiny_overrides: Callable[..., list[str]], tmp_path: Path, world_size: int
) -> None:
    overrides = tiny_overrides(tmp_path, REPORT, "eval_interval=3ba", "save_interval=3ba")
    outcomes = run_distributed(train_from_command_line, world_size, overrides)
    assert [status for status, _ in outcomes] == [0] * world_size
    assert all(texts[0] == "" for _, texts in outcomes[1:]), "one rank reports"

    lines = outcomes[0][1][0].splitlines()
    shown = dict(
        line.split(maxsplit=1) for line in lines if line.startswith(("checkpoint", "completion")) and " " in line
    )
    held_out = finished(tmp_path).column("metrics/eval/LanguageCrossEntropy")[4]
    assert f"held-out loss    {held_out:.4f} nats/token" in lines
    assert any(line.startswith("unigram entropy  3.") for line in lines)
    assert f"    | {PROMPT}" in "\n".join(lines)
    assert shown["checkpoint"] == str(tmp_path / "checkpoints" / "ba4")
    assert (tmp_path / "checkpoints" / "ba4" / "state.json").is_file()
    page = (tmp_path / "report.html").read_text()
    assert "state finished" in page
    assert page.count("<svg") >= 8
    assert "<td>override</td>" in page, "where values of the recipe come from"
    for name in ("loss.png", "expert_load.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert any(line.endswith(str(tmp_path / name)) for line in lines)

    command = next(line.removeprefix("go on with").strip() for line in lines if line.startswith("go on with"))
    launcher, arguments = shlex.split(command.split("scripts/train.py")[0]), shlex.split(command.split("train.py")[1])
    assert Path(launcher[0]).is_file()
    assert [Path(launcher[0]).name, *launcher[1:]] == (["python"] if world_size == 1 else ["composer", "-n", "2"])
    path, changes = split_arguments(arguments)
    assert load_recipe(path, changes).max_duration == "8ba"
    assert "\nbatch 1/4  loss" in f"\n{outcomes[0][1][1]}"
    outcomes = run_distributed(train_from_command_line, world_size, [*arguments, "--quiet"])
    assert [status for status, _ in outcomes] == [0] * world_size, outcomes
    assert "\nbatch" not in f"\n{outcomes[0][1][1]}"
    run = finished(tmp_path)
    assert [line["batch"] for line in run.metrics] == list(range(1, 9))
    assert "ba8" in run.checkpoints()


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_only_reports(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, REPORT, "autoresume=true", "eval_interval=2ba")
    first = run_recipe(recipe)
    again = run_recipe(recipe)
    assert again.metrics == first.metrics
    assert again.checkpoints() == first.checkpoints()
    assert again.out == first.out
    assert "checkpoint" in again.out


def break_every_part() -> None:
    import matplotlib.figure

    import moefoundry.callbacks.report as report
    import moefoundry.trainer as training

    def fail(*arguments: object, **options: object) -> None:
        raise IndexError("index -1 is out of\nbounds")

    def disk_is_full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    training.complete = fail
    matplotlib.figure.Figure.savefig = disk_is_full  # type: ignore[method-assign]
    report.unigram_entropy = fail  # type: ignore[assignment]
    report.store_of = fail  # type: ignore[assignment]
    report.report_page = fail  # type: ignore[assignment]


def test_a_report_that_fails_does_not_fail_a_finished_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe(tmp_path, REPORT, "eval_interval=2ba"), before=break_every_part)
    warnings = [line for line in run.err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: the report has no completion: index -1 is out of bounds",
        "warning: the report has no unigram entropy: index -1 is out of bounds",
        "warning: the report has no loss.png: [Errno 28] No space left on device",
        "warning: the report has no expert_load.png: [Errno 28] No space left on device",
        "warning: the report has no report.html: index -1 is out of bounds",
        "warning: the report has no checkpoint: index -1 is out of bounds",
    ]
    assert [line.split("  ")[0] for line in run.out.splitlines()] == ["held-out loss", "go on with"]
    assert "ba4" in run.checkpoints()


def report_without_metrics(recipe: Recipe) -> list[str]:
    from moefoundry.callbacks.report import write_report

    with captured_output() as texts:
        write_report(recipe, "text", ["train"])
    return texts


def test_a_report_of_a_run_dir_without_metrics_says_what_it_can(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """As of a run that goes on from another's last batch, and has nothing left to train."""
    ((out, err),) = run_distributed(report_without_metrics, 1, tiny_recipe(tmp_path / "new"))
    assert out == "completion\n    | text\ngo on with       train autoresume=true max_duration=8ba\n"
    assert [line.split(":")[1] for line in err.splitlines()] == [
        " the report has no metrics",
        " the report has no report.html",
    ]
