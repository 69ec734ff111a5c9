"""Disks that are full, fail or may not be written to: one line with the path, and nothing half-written, for every way
of converting."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.conversion.convert import import_hf
from moefoundry.data import staging
from tests.conversion.hf import family_config, write_hf, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
COMMANDS = {
    "import": "import --hf {0}/hf --output {1}/out",
    "export": "export --checkpoint {0}/checkpoint --hf {1}/out --tokenizer {0}/tokenizer",
    "export_shards": "export --checkpoint {0}/checkpoint --hf {1}/out --max-shard-size 30KB",
    "consolidate": "consolidate --checkpoint {0}/checkpoint --output {1}/out",
    "consolidate_file": "consolidate --checkpoint {0}/checkpoint --output {1}/out.safetensors",
    "upcycle": "upcycle --hf {0}/dense --output {1}/out --num-experts 4 --top-k 2",
}
commands = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything to convert from."""
    root = tmp_path_factory.mktemp("source")
    write_hf(root / "hf", "mixtral", family_config("mixtral"))
    write_hf(root / "dense", "qwen3", family_config("qwen3"))
    import_hf(root / "hf", root / "checkpoint")
    write_tokenizer(root / "tokenizer")
    return root


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file may grow beyond it; Python raises the error of the write that would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(command: str, source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says why, where nothing is left."""
    before = sorted(target.rglob("*")) if target.is_dir() else None
    assert main(["convert", *command.format(source, target).split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert (sorted(target.rglob("*")) if target.is_dir() else None) == before
    return err


@commands
def test_a_write_that_fails(source: Path, tmp_path: Path, capsys, command: str) -> None:
    with file_size_limit(20_000):
        message = refused(command, source, tmp_path, capsys)
    assert re.match(rf"error: {tmp_path}/out\S*: cannot be written: File too large \({tmp_path}/\.?out.*\)\n", message)


@commands
def test_a_disk_that_fills_up(source: Path, tmp_path: Path, capsys, monkeypatch, command: str) -> None:
    """With the last file: the one before which all seemed well."""
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if path.name.startswith(".out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    message = refused(command, source, tmp_path, capsys)
    assert re.match(rf"error: {tmp_path}/out\S*: cannot be written: No space left on device \({tmp_path}/out", message)


@commands
def test_a_disk_that_is_too_small_is_known_at_once(source: Path, tmp_path: Path, capsys, monkeypatch, command) -> None:
    free = staging.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    assert "GiB are needed, and 0.00 GiB are free there" in refused(command, source, tmp_path, capsys)


@commands
def test_a_directory_that_may_not_be_written_to(source: Path, tmp_path: Path, capsys, monkeypatch, command) -> None:
    """As for a user who is not root."""

    def denied(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = refused(command, source, tmp_path, capsys)
    assert message.endswith(f": cannot be written: Permission denied ({tmp_path})\n")


@commands
def test_a_parent_that_is_a_file(source: Path, tmp_path: Path, capsys, command: str) -> None:
    (tmp_path / "file").touch()
    message = refused(command, source, tmp_path / "file", capsys)
    assert message.startswith(f"error: {tmp_path}/file/out")


def test_cleaning_up_that_fails_does_not_hide_the_reason(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def stuck(path: Path) -> None:
        if path.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(staging, "_remove", stuck)
    with file_size_limit(20_000):
        assert main(["convert", *COMMANDS["import"].format(source, tmp_path).split()]) == 2
    assert capsys.readouterr().err.count("File too large") == 1
