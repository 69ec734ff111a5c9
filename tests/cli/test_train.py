"""`moefoundry train` with bad input: one clear line that names the culprit, exit status 2, nothing written over."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed import captured_output, run_distributed
from tests.train.runs import finished

ROOT = Path(__file__).parents[2]
Overrides = Callable[..., list[str]]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def command_line(arguments: Sequence[str]) -> Outcome:
    from moefoundry.cli.main import main

    with captured_output() as texts:
        status = main(["train", *arguments])
    return Outcome(status, *texts)


def train(*arguments: str) -> Outcome:
    return run_distributed(command_line, 1, arguments)[0]


def assert_refused(outcome: Outcome, pattern: str) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert "Warning" not in outcome.err
    assert re.search(pattern, outcome.err), outcome.err


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        (
            ["train_loader.dataset.local=missing/corpus"],
            r"missing/corpus: no such directory .* make it with: moefoundry prepare stdlib missing/corpus",
        ),
        (["model.vocab_size=300"], r"corpus: its vocabulary of 384 exceeds the model's vocab_size 300"),
        (["max_seq_len=128"], r"corpus: packed to max_seq_len 64, and the recipe's max_seq_len is 128"),
        (["global_train_batch_size=80"], r"corpus/train: 53 sample\(s\), fewer than one global batch of 80"),
        (
            ["callbacks.report={}", "tokenizer.name=missing/tokenizer"],
            r"missing/tokenizer/tokenizer\.json: no such file",
        ),
        (["load_path=missing/run"], r"load_path: no complete checkpoint at missing/run"),
        (
            ["model.moe.backend=megablocks"],
            r"model\.moe\.expert_hidden_size: .*megablocks.* 32 is not divisible by 128",
        ),
        (["precision.fp8={recipe: rowwise, exclude: [heads]}"], r"precision\.fp8\.exclude: no module is named 'heads'"),
        (
            ["precision.fp8={recipe: deepseek_v3, backend: triton}"],
            r"precision\.fp8\.backend: backend triton cannot run: its kernels need a CUDA device, not cpu",
        ),
        (["model.moe.backend=triton"], r"model\.moe\.backend: triton cannot run: "),
        (["seed", "3"], r"seed: an override is written key=value; did you mean 'seed=3'\?"),
        (["model.moe.topk=4"], r"model\.moe\.topk: unknown key; did you mean 'model\.moe\.top_k'\?"),
    ],
    ids=lambda value: value[-1].partition("=")[0] if isinstance(value, list) else "",
)
def test_bad_input_is_named_and_leaves_the_directory_free(
    tiny_overrides: Overrides, tmp_path: Path, changes: list[str], pattern: str
) -> None:
    run_dir = tmp_path / "run"
    assert_refused(train(*tiny_overrides(run_dir, *changes)), pattern)
    assert not run_dir.exists() or files(run_dir) == {}


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_overrides: Overrides, tmp_path: Path) -> None:
    from moefoundry.data.tokenizer import train_tokenizer

    train_tokenizer(["some text of many words, " * 50 + str(list(range(500)))], 500).save(tmp_path / "large")
    changes = ["callbacks.report={}", f"tokenizer.name={tmp_path}/large"]
    outcome = train(*tiny_overrides(tmp_path / "run", *changes))
    assert_refused(outcome, r"tokenizer\.name: .*/large has a vocabulary of \d+, which exceeds model\.vocab_size 384")


def test_an_unknown_recipe_file_is_named_with_a_suggestion() -> None:
    path = str(ROOT / "configs" / "quikstart.yaml")
    assert_refused(train(path), r"quikstart\.yaml: no such recipe file; did you mean '.*quickstart\.yaml'\?")


def test_a_run_dir_that_cannot_be_made_is_named(tiny_overrides: Overrides, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = train(*tiny_overrides(tmp_path / "file" / "run"))
    assert_refused(outcome, r"run_dir: cannot create .*/file/run: Not a directory")
    outcome = train(*tiny_overrides(tmp_path / "file"))
    assert_refused(outcome, r"run_dir: .*/file is not a directory that can be written to")


def test_every_rank_ends_and_one_speaks(tiny_overrides: Overrides, tmp_path: Path) -> None:
    for changes in (["model.vocab_size=300"], ["load_path=missing"], ["global_train_batch_size=9"]):
        first, second = run_distributed(command_line, 2, tiny_overrides(tmp_path, *changes))
        assert_refused(first, "vocab_size|load_path|global_train_batch_size")
        assert second == Outcome(2, "", "")


@pytest.fixture(scope="module")
def trained(tiny_overrides: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    outcome = train(*tiny_overrides(run_dir))
    assert outcome.status == 0, outcome
    return run_dir


def test_a_run_dir_of_another_recipe_is_refused(tiny_overrides: Overrides, trained: Path) -> None:
    before = files(trained)
    outcome = train(*tiny_overrides(trained, "seed=18", "model.moe.top_k=1", "autoresume=true", "max_duration=9ba"))
    assert_refused(outcome, r"belongs to a run with another recipe")
    assert "\n  seed: 17 -> 18\n" in outcome.err
    assert "\n  model.moe.top_k: 2 -> 1\n" in outcome.err
    assert "max_duration" not in outcome.err
    assert files(trained) == before


def test_checkpoints_are_not_trained_over(tiny_overrides: Overrides, trained: Path) -> None:
    before = files(trained)
    assert_refused(
        train(*tiny_overrides(trained)), r"holds checkpoints of this recipe; continue it with autoresume=true"
    )
    assert files(trained) == before


def test_a_run_s_own_recipe_under_a_new_name_does_not_go_on_in_the_old_directory(
    tiny_overrides: Overrides, trained: Path, tmp_path: Path
) -> None:
    orig = Path(shutil.copytree(trained, tmp_path / "tiny"))
    config = orig / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(orig)))
    before = files(orig)
    changes = [str(config), "run_name=fork", f"load_path={orig}/checkpoints/ba4", "max_duration=5ba", "autoresume=true"]
    outcome = train(*changes)
    assert_refused(outcome, rf"run_name: fork, and {orig} is the run tiny; .*: run_dir={tmp_path}/fork;")
    assert files(orig) == before
    outcome = train(*changes, f"run_dir={tmp_path}/fork")
    assert outcome.status == 0, outcome
    assert "load_path is not read" not in outcome.err
    assert files(orig) == before
    assert finished(tmp_path / "fork").checkpoints() == ["ba5"]
    outcome = train(*changes, f"run_dir={orig}")
    assert outcome.status == 0, outcome
    assert f"note: load_path is not read: the run goes on from {orig}/checkpoints/ba4, its own" in outcome.err


def test_a_checkpoint_of_another_architecture_is_refused(
    tiny_overrides: Overrides, trained: Path, tmp_path: Path
) -> None:
    changes = [f"load_path={trained}", "model.d_model=64", "model.moe.num_experts=8"]
    outcome = train(*tiny_overrides(tmp_path / "run", *changes))
    assert_refused(outcome, r"checkpoints/ba4 is a checkpoint of another architecture")
    assert "model.d_model: 32 there, 64 here" in outcome.err
    assert "model.moe.num_experts: 4 there, 8 here" in outcome.err
    assert files(tmp_path / "run") == {}


def test_damaged_checkpoints_are_named(tiny_overrides: Overrides, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained / "checkpoints" / "ba4", copy)
    next(copy.glob("*.distcp")).unlink()
    changes = [f"load_path={copy}", "max_duration=8ba"]
    assert_refused(train(*tiny_overrides(tmp_path / "run", *changes)), r"copy/\w+\.distcp: unreadable")
    (copy / "state.json").write_text('{"recipe": ')
    assert_refused(train(*tiny_overrides(tmp_path / "run", *changes)), r"copy/state\.json: unreadable")


@pytest.mark.parametrize(
    ("world_size", "program", "expected"),
    [
        (1, "scripts/train.py", "python scripts/train.py"),
        (2, "/some/where/scripts/train.py", "composer -n 2 /some/where/scripts/train.py"),
        (1, "/usr/bin/moefoundry", "python -m moefoundry train"),
        (2, "src/moefoundry/__main__.py", "composer -n 2 -m moefoundry train"),
    ],
)
def test_the_command_to_go_on_with_is_the_one_that_was_used(world_size: int, program: str, expected: str) -> None:
    from moefoundry.cli.train import _command

    assert " ".join(_command(world_size, program)).endswith(f"bin/{expected}")


def test_the_launcher(tiny_overrides: Overrides, tmp_path: Path) -> None:
    """The one command of the documentation, in fresh processes."""
    launcher = Path(sys.executable).parent / "composer"
    changes = ["callbacks.report={max_new_tokens: 4}", "eval_interval=2ba"]
    command = [launcher, "-n", "2", "scripts/train.py", "configs/quickstart.yaml", *tiny_overrides(tmp_path, *changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = finished(tmp_path)
    assert [line["batch"] for line in run.metrics] == [1, 2, 3, 4]
    assert run.checkpoints() == ["ba4"]
    text = done.stdout + done.stderr
    assert "batch 4: held-out loss" in text
    assert re.search(r"go on with {7}\S*bin/composer -n 2 scripts/train\.py configs/quickstart\.yaml", text)
    assert "Traceback" not in text
