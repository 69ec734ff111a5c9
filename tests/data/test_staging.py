"""Interruptions, dead processes, full disks: OUT is whole or absent, and nothing is left beside it."""

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.config.errors import UserError
from moefoundry.data import prepare as prepare_module
from moefoundry.data import staging as module
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.staging import clear_abandoned, staged


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"line {number:02d} of words\n" * 20)
    return PrepareOptions(str(tmp_path / "in"), tmp_path / "out", max_seq_len=32, vocab_size=300, val_fraction=0.2)


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    return int(subprocess.run(["sh", "-c", "echo $$"], capture_output=True, check=True).stdout)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal, heard also where the tests run under ``nohup``."""
    before = signal.getsignal(request.param)
    if before is signal.SIG_IGN:
        signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_leaves_nothing_behind(
    options: PrepareOptions,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["prepare", options.source, str(options.out), "--max-seq-len=32", "--vocab-size=300"]
    seen: list[list[str]] = []
    remove = module.shutil.rmtree

    def end(*_: object) -> None:
        seen.append(names(options.out.parent))
        os.kill(os.getpid(), number)

    def remove_under_fire(*positional: object, **named: object) -> None:
        if seen:
            os.kill(os.getpid(), number)  # a second one while the first is being answered
        remove(*positional, **named)

    monkeypatch.setattr(prepare_module.CorpusSummary, "write", end)
    monkeypatch.setattr(module.shutil, "rmtree", remove_under_fire)
    before = signal.getsignal(number)
    assert main(args) == 128 + number
    assert capsys.readouterr().err == f"error: stopped by {number.name}; OUT was not written\n"
    assert any(".partial-" in name for name in seen[0])
    assert names(options.out.parent) == ["in"]
    assert signal.getsignal(number) == before


def test_what_dead_processes_left_is_removed(options: PrepareOptions, dead: int) -> None:
    parent = options.out.parent
    for name in (f".out.partial-{dead}", f".out.partial-{module._host()}-{dead}", f".out.replaced-{dead}"):
        (parent / name / "train").mkdir(parents=True)
    kept = [f".out.partial-{os.getppid()}", f".out.partial-elsewhere-{dead}", f".out2.partial-{dead}", ".out.partial-x"]
    for name in kept:
        (parent / name).mkdir()
    options.out.mkdir()
    prepare(options)
    assert names(parent) == sorted([*kept, "in", "out"])
    idle = parent / f".out.partial-elsewhere-{dead}"
    os.utime(idle, (0, 0))
    clear_abandoned(options.out)
    assert not idle.exists()


def test_a_corpus_that_was_being_replaced_comes_back(options: PrepareOptions, dead: int) -> None:
    """Killed between the two renames: the old corpus is neither lost nor in the way."""
    prepare(options)
    options.out.rename(options.out.parent / f".out.replaced-{module._host()}-{dead}")
    assert prepare(options).up_to_date
    assert names(options.out.parent) == ["in", "out"]


def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def overtaken() -> None:
        with staged(out) as directory:
            directory.mkdir()
            out.mkdir()
            (out / "theirs").write_text("")

    with pytest.raises(UserError, match="out: another process has written it meanwhile"):
        overtaken()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["theirs"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 64 KiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_line_with_the_path(options: PrepareOptions) -> None:
    for number in range(8):
        words = " ".join(f"{number * 7919 % 100_003:x}" for number in range(4000 * number, 4000 * number + 4000))
        (Path(options.source) / f"large{number}.txt").write_text(words)
    with pytest.raises(UserError, match=r"out: cannot be written: File too large \(.*\)") as raised:
        prepare(replace(options, max_seq_len=16))
    assert "\n" not in str(raised.value)
    assert names(options.out.parent) == ["in"]


def test_what_cannot_be_removed_is_named(options: PrepareOptions, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = options.out.parent / f".out.partial-{dead}"
    left.mkdir()

    def refuse(place: Path) -> None:
        raise PermissionError(13, "Permission denied", str(place / "train"))

    monkeypatch.setattr(module.shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=rf"^/.*/{left.name}: left by a process .*: Permission denied$"):
        clear_abandoned(options.out)


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_no_permission_is_one_line_with_the_path(
    options: PrepareOptions, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(UserError, match=r"out: cannot be written: Permission denied \(/.*\)$"):
        prepare(options)
    assert names(options.out.parent) == ["in"]


def test_a_killed_process_is_cleaned_up_after(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended by SIGKILL with all but one file written, and run again."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.CorpusSummary, "write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:
            try:
                prepare(options)
            finally:
                os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = [name for name in names(options.out.parent) if ".partial-" in name]
    assert names(options.out.parent / left) == ["tokenizer", "train", "val"]
    assert not prepare(options).up_to_date
    assert names(options.out.parent) == ["in", "out"]
