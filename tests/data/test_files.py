"""Finding files: links, loops, what cannot be read, patterns."""

import os
import socket
from pathlib import Path

import pytest

from moefoundry.config.errors import UserError
from moefoundry.data.corpus import Corpus, open_corpus
from moefoundry.data.files import matches
from moefoundry.data.left_out import Reason


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def opened(place: Path, **options) -> Corpus:
    return open_corpus(str(place), **options)


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    write(root, "own/a.txt", "own/deep/b.txt", "z.txt")
    write(tmp_path, "elsewhere/far/c.txt", "elsewhere/d.txt", "e.txt")
    (root / "a link").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(tmp_path / "elsewhere" / "far")
    (root / "0 own").symlink_to(root / "own")
    (root / "own" / "loop").symlink_to(root)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    (root / "linked.txt").symlink_to(tmp_path / "e.txt")
    (root / "linked twice.txt").symlink_to(root / "linked.txt")
    (root / "own.txt").symlink_to(root / "z.txt")
    corpus = opened(root)
    assert corpus.paths == (
        "a link/d.txt",
        "a link/far/c.txt",
        "linked twice.txt",
        "own/a.txt",
        "own/deep/b.txt",
        "z.txt",
    )
    assert corpus.unusable == ()
    assert [document.text for document in corpus.documents()][:2] == ["elsewhere/d.txt", "elsewhere/far/c.txt"]


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "other pipe")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "gone").symlink_to("no directory")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "dir.txt").mkdir()
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        corpus = opened(tmp_path)
    assert corpus.paths == ("a.txt",)
    assert corpus.unusable == (
        ("gone", Reason.broken_link, None),
        ("gone.txt", Reason.broken_link, None),
        ("pipe.txt", Reason.special, 0),
        ("self.txt", Reason.broken_link, None),
        ("socket.txt", Reason.special, 0),
    )
    with pytest.raises(UserError, match=r"pipe\.txt: neither a file nor a directory"):
        opened(tmp_path / "pipe.txt")


def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "secret/b.txt", "other/c.log")
    scandir = os.scandir  # the tests may run as root, who can read everything

    def refuse(place: Path) -> object:
        if place.name == "secret":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert opened(tmp_path).unusable == (("secret/", Reason.unreadable, None),)
    assert opened(tmp_path, globs=("other/*.log",)).unusable == ()
    assert opened(tmp_path, globs=("*/*.txt", "*.txt")).unusable == (("secret/", Reason.unreadable, None),)


def test_names_count_in_any_case_and_compressed(tmp_path: Path) -> None:
    write(tmp_path, "A.TXT", "b.Md", "c.txt.gz", "d.txt.zst", ".hidden.txt", ".git/e.txt", "f.gz")
    assert opened(tmp_path).paths == ("A.TXT", "b.Md", "c.txt.gz", "d.txt.zst")


def test_the_output_is_no_part_of_the_corpus(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "out/tokenizer/merges.txt")
    assert opened(tmp_path, leave=tmp_path / "out").paths == ("a.txt",)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.rs", "*.rs", True),
        ("b/a.rs", "*.rs", False),
        ("b/a.rs", "*/*.rs", True),
        ("a.rs", "**/*.rs", True),
        ("c/b/a.rs", "**/*.rs", True),
        ("c/b/a.rs", "c/**", True),
        ("c/b/a.rs", "b/**", False),
        ("c/d/b/a.rs", "c/**/b/*", True),
        ("x[1]/a", "x[[]1]/?", True),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*", "a/../../*"])
def test_patterns_stay_inside(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "a.txt")
    with pytest.raises(UserError, match=f"globs='{pattern}': not a pattern relative to".replace("*", r"\*")):
        opened(tmp_path, globs=(pattern,))
