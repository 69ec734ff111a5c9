"""Every command reads every URL: what lies in a store is listed, verified, shown and converted as local files are."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from moefoundry.checkpoint.fetch import checkpoint_at, directory_at
from moefoundry.checkpoint.remote import ORIGIN_FILE, upload_checkpoint
from moefoundry.cli.main import main
from moefoundry.config import UserError
from tests.checkpoint.test_remote import read, saved


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A run in fsspec's memory, with checkpoints of two batches and an upload that did not end."""
    url = f"memory://{tmp_path.name}/run"
    for batch in (9, 10):
        upload_checkpoint(saved(tmp_path / "local", batch), url)
    fsspec.open(f"{url}/ba12/__0_0.distcp", "wb").open().close()
    return url


def moefoundry(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, (out + err).splitlines()


def test_checkpoints_behind_a_url_are_listed_and_verified(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, (_, *lines) = moefoundry(capsys, "checkpoint", "list", url)
    assert status == 0
    assert [line.split()[0] for line in lines] == ["ba9", "ba10", "ba12"]
    assert [line.split()[-1] for line in lines] == ["committed"] * 3
    assert "not committed" in lines[2]
    status, lines = moefoundry(capsys, "checkpoint", "verify", f"{url}/ba9")
    assert (status, lines) == (0, [f"{url}/ba9: intact"])
    status, lines = moefoundry(capsys, "checkpoint", "show", url)
    assert status == 0
    assert lines[0].startswith(f"{url}: batch ")
    assert any("model/weight" in line for line in lines)


def test_of_a_run_directory_behind_a_url_its_checkpoints_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{tmp_path.name}/run"
    for place, batch in (("checkpoints", 9), ("nonfinite", 9), ("nonfinite", 12)):
        upload_checkpoint(saved(tmp_path / place, batch), f"{url}/{place}")
    aside = saved(tmp_path, 8)
    upload_checkpoint(aside.rename(aside.with_name("ba8.quarantine-0")), f"{url}/checkpoints")
    status, (_, *lines) = moefoundry(capsys, "checkpoint", "list", url)
    assert status == 0
    assert [line.split()[0] for line in lines] == ["ba8.quarantine-0", "ba9"]
    assert [line.split()[-1] for line in lines] == ["quarantined", "committed"]
    status, lines = moefoundry(capsys, "checkpoint", "verify", url)
    assert (status, lines) == (0, [f"{url}/checkpoints/{name}: intact" for name in ("ba8.quarantine-0", "ba9")])


def test_damage_behind_a_url_is_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    files, root = fsspec.core.url_to_fs(url)
    content = bytearray(files.cat(f"{root}/ba9/__0_0.distcp"))
    content[len(content) // 2] ^= 1
    files.pipe(f"{root}/ba9/__0_0.distcp", bytes(content))
    files.rm(f"{root}/ba10/__0_0.distcp")
    status, lines = moefoundry(capsys, "checkpoint", "verify", url)
    assert status == 1
    assert f"{url}/ba9/__0_0.distcp: offset 0: damaged" in lines[0]
    assert f"{url}/ba10/__0_0.distcp: cannot download" in lines[1]
    assert f"{url}/ba12" in lines[2]


def test_what_is_fetched_is_removed(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    with checkpoint_at(url) as checkpoint:
        assert read(checkpoint) == 10
        assert (checkpoint / ORIGIN_FILE).stat().st_mode & 0o077 == 0, "an address may have a password"
    assert list((tmp_path / "scratch").iterdir()) == []
    with pytest.raises(UserError, match="memory://none/here: no complete checkpoint there"):
        checkpoint_at("memory://none/here").__enter__()


def test_a_directory_behind_a_url(url: str) -> None:
    with directory_at(f"{url}/ba9/") as directory:
        assert directory.name == "ba9"
        assert read(directory) == 9
    with pytest.raises(UserError, match="memory://none/here: nothing is there"):
        directory_at("memory://none/here").__enter__()


def test_paths_and_file_urls_are_taken_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path / "odd%20ü", 4)
    for place in (str(directory.parent), directory.parent.as_uri()):
        assert moefoundry(capsys, "checkpoint", "verify", place) == (0, [f"{directory}: intact"])
    assert moefoundry(capsys, "checkpoint", "list", str(directory))[1][1].startswith("ba4 "), "of one checkpoint, too"


def test_checkpoints_in_a_store_are_not_deleted(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, (line,) = moefoundry(capsys, "checkpoint", "delete", f"{url}/ba9", "--yes")
    assert status == 2
    assert line == f"error: {url}/ba9: checkpoints in a store are deleted with the store's own tools"
