"""How commands end, whatever happens to them; and what a training that cannot start leaves behind: nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.cli.exits import ended_by_sigterm, exit_status
from moefoundry.cli.main import COMMANDS, main
from tests.cli.test_train import Outcome, command_line, files
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed

Overrides = Callable[..., list[str]]


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_that_are_not_utf8_are_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--prompt", os.fsdecode(b"caf\xe9")]) == 2
    assert capsys.readouterr().err == "error: argument 3 is not UTF-8 text: caf\\xe9\n"


def test_ctrl_c_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_status(interrupted) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["validate", "--print"], 141), (["checkpoint", "--help"], 141)],
)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str], status: int, tiny_corpus: Path) -> None:
    """As of `moefoundry ... | head`."""
    script = "import sys; from moefoundry.cli.main import main; sys.exit(main(sys.argv[1:]))"
    read, write = os.pipe()
    os.close(read)
    if arguments[0] == "validate":
        arguments = [*arguments, str(QUICKSTART), f"train_loader.dataset.local={tiny_corpus}", "max_seq_len=64"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (status, b"")


def test_sigterm_lets_a_command_clean_up(tmp_path: Path) -> None:
    def command() -> int:
        with ended_by_sigterm():
            (tmp_path / "partial").write_text("")
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                (tmp_path / "partial").unlink()
        return 0

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # composer, where it was imported, has set another
    try:
        with pytest.raises(SystemExit) as ended:
            exit_status(command)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not (tmp_path / "partial").exists()


def test_errors_of_the_system_are_a_line_with_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out")

    assert exit_status(full) == 2
    assert capsys.readouterr().err == "error: /data/out: No space left on device\n"


def test_letters_that_a_terminal_cannot_show_are_escaped() -> None:
    script = "import sys; from moefoundry.cli.exits import exit_status; sys.exit(exit_status(lambda: print('ü') or 0))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, b"\\xfc\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["checkpoint", "list", "s3:/bucket"],
        ["generate", "--prompt", "x", "--checkpoint", "nowhere://me:hidden@host/run"],
        ["convert", "export", "--checkpoint", "run", "--hf", "s3://bucket/out"],
        ["convert", "import", "dir", "-o", "gs://bucket/out"],
        ["prepare", "text", "s3:/bucket/data"],
    ],
)
def test_places_are_read_by_one_rule_and_written_as_paths(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "two slashes" in err or "no store has URLs" in err or "must be a path, not a URL" in err
    assert "hidden" not in err


def starts_that_fail(place: Path, overrides: list[str], lease: str) -> list[tuple[Outcome, dict[str, bytes]]]:
    """Command lines, each with what it left in its run directory."""
    from moefoundry import build as parts
    from moefoundry.config import UserError

    run_dir = place / "run"

    def attempt(*changes: str) -> tuple[Outcome, dict[str, bytes]]:
        return command_line([*overrides, *changes]), files(run_dir) if run_dir.exists() else {}

    results = [attempt("save_remote=/proc/none"), attempt("loggers.mlflow={tracking_uri: 'http://127.0.0.1:9'}")]

    def refuse(*args: object) -> None:
        raise UserError("cannot be built")

    build, parts.build_callbacks = parts.build_callbacks, refuse
    results.append(attempt(f"save_remote={place}/uploads", f"load_path=file://{place}/none"))
    results.append(attempt())
    parts.build_callbacks = build
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "lease.json").write_text(lease)
    begin = time.monotonic()
    results.append(attempt())
    assert time.monotonic() - begin < 1
    (run_dir / "lease.json").unlink()
    corpus = next(text.partition("=")[2] for text in overrides if text.startswith("train_loader.dataset.local="))
    data = [f"train_loader.dataset.{key}" for key in (f"remote=file://{corpus}", f"local={place}/cache")]
    results.append(attempt(*data, f"tokenizer.name={corpus}/tokenizer", "eval_loader=null", "max_duration=2ba"))
    return results


def test_a_start_that_fails_leaves_the_directory_free(tiny_overrides: Overrides, tmp_path: Path) -> None:
    """And then a run with data behind a file:// URL takes it."""
    holder = {
        "token": "a1",
        "host": "node7",
        "kernel": "another",
        "pid": 7,
        "started": 1,
        "since": "2026-01-01T00:00:00Z",
    }
    arguments = tmp_path / "new", tiny_overrides(tmp_path / "new" / "run"), json.dumps(holder)
    (results,) = run_distributed(starts_that_fail, 1, *arguments)
    patterns = [
        "/proc/none/.*: cannot upload",
        "loggers.mlflow: http://127.0.0.1:9 does not answer",
        "no complete checkpoint at .*/new/none",
        "cannot be built",
        r"is in use by another run, process 7 on node7, since .* \(last sign of life",
    ]
    for (outcome, left), pattern in zip(results, patterns, strict=False):
        assert outcome.status == 2, outcome
        assert len(outcome.err.splitlines()) == 1
        assert re.search(pattern, outcome.err), outcome.err
        assert set(left) <= {"lease.json"}
    assert set(results[4][1]) == {"lease.json"}, "the other run's stays"
    assert results[5][0].status == 0, results[5][0]
    assert "config.yaml" in results[5][1]
    assert "lease.json" not in results[5][1]
