"""Corpora that are prepared into a store, and read from there."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from streaming import StreamingDataLoader

from moefoundry.cli.main import main
from moefoundry.config.errors import UserError
from moefoundry.data import stores
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.stores import Remote
from moefoundry.data.summary import Layout
from tests.data.shards import config_of, tokens_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"line {number} of a text\n" * 5)
    options = PrepareOptions(str(tmp_path / "in"), f"memory://{tmp_path.name}/out", vocab_size=280, val_fraction=0.2)
    return replace(options, max_seq_len=16)


def tree(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stored(url: str, target: Path) -> dict[str, str]:
    remote = Remote(url)
    for name in remote.names():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        remote.download(name, target / name)
    return tree(target)


@pytest.mark.parametrize("layout", Layout)
def test_a_store_gets_what_a_directory_gets(options: PrepareOptions, tmp_path: Path, layout: Layout) -> None:
    options = replace(options, layout=layout, max_seq_len=16 if layout is Layout.packed else None)
    assert not prepare(options).up_to_date
    prepare(replace(options, out=tmp_path / "local"))
    assert stored(str(options.out), tmp_path / "copy") == tree(tmp_path / "local")
    assert prepare(options).up_to_date
    assert not list((tmp_path / "temporary").rglob("*.mds")), "nothing stays here"
    with pytest.raises(UserError, match=r"memory://.*/out: holds another corpus; .*seed \(17 there, 18 now\)"):
        prepare(replace(options, seed=18))


def test_an_upload_that_fails_goes_on(options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Remote.upload

    def failing(self: Remote, file: Path, name: str) -> None:
        if name.startswith("val/"):
            raise UserError("no route")
        upload(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "upload", failing)
        with pytest.raises(UserError, match="no route"):
            prepare(options)
    names = Remote(str(options.out)).names()
    assert names
    assert "corpus.json" not in names
    with monkeypatch.context() as patch:
        patch.setattr("moefoundry.data.prepare.write_blocks", None)  # the work itself is not done again
        prepare(options)
    assert prepare(options).up_to_date


@pytest.mark.parametrize("ended_at", ["train/index.json", "tokenizer/tokenizer.json", "corpus.json"])
def test_a_corpus_that_is_replaced_counts_no_more_from_the_beginning_on(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_at: str
) -> None:
    """Where the upload ends, the corpus that was there is not taken for whole; and nothing of it stays in the end."""
    prepare(options)
    upload = Remote.upload

    def ended(self: Remote, file: Path, name: str) -> None:
        if name == ended_at and file.stat().st_size:
            raise UserError("the machine is lost")
        upload(self, file, name)

    other = replace(options, seed=18, val_fraction=0.0, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "upload", ended)
        with pytest.raises(UserError, match="the machine is lost"):
            prepare(other)
    shutil.rmtree(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    assert not prepare(options).up_to_date
    prepare(other)
    prepare(replace(other, out=tmp_path / "local", overwrite=False))
    assert stored(str(options.out), tmp_path / "copy") == tree(tmp_path / "local"), "nothing held out stays"


def test_an_object_store_keeps_empty_objects_of_a_corpus_that_is_replaced(
    s3: dict[str, str], options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    first = replace(options, out="s3://bucket/corpora/replaced")
    prepare(first)
    second = replace(first, val_fraction=0.0, overwrite=True)
    assert not prepare(second).up_to_date
    assert prepare(replace(second, overwrite=False)).up_to_date
    remote = Remote(str(first.out))
    left = [name for name in remote.names() if name.startswith("val/")]
    assert "val/index.json" in left
    for number, name in enumerate(left):
        remote.download(name, tmp_path / str(number))
        assert (tmp_path / str(number)).stat().st_size == 0


def test_something_else_at_the_place_stays(options: PrepareOptions) -> None:
    with fsspec.open(f"{options.out}/notes.txt", "w") as file:
        file.write("mine")
    with pytest.raises(UserError, match=r"/out: holds notes\.txt and is no prepared corpus; choose another OUT"):
        prepare(options)


def test_training_reads_from_the_store(
    s3: dict[str, str],
    options: PrepareOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[..., StreamingDataLoader],
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    url = "s3://bucket/corpora/mine"
    line = ["prepare", options.source, url, "--max-seq-len=16", "--vocab-size=280", "--val-fraction=.2"]
    assert main(line) == 0
    loader = build(config_of(tmp_path / "cache", remote=url))
    assert len(tokens_of(loader)) > 0
