"""Finding documents, their order, and the held-out split."""

import json
from pathlib import Path

import pytest

from moefoundry.config.errors import UserError
from moefoundry.data.corpus import Document, open_corpus
from moefoundry.data.formats import CorpusFormat
from moefoundry.data.left_out import Reason
from moefoundry.data.splits import Split, split_of, unit_hash
from tests.data.shards import scan


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def ids(source: Path | str, **options) -> list[str]:
    return [document.doc_id for document in open_corpus(str(source), **options).documents()]


def test_text_is_streamed_in_path_order_byte_for_byte(tmp_path: Path) -> None:
    root = write(tmp_path, {"b.txt": "two\r\nlines ", "a/z.md": "# one\n", "a/.git/x.txt": "hidden", "c.py": "pass"})
    corpus = open_corpus(str(root), CorpusFormat.text)
    assert [(document.doc_id, document.text) for document in corpus.documents()] == [
        ("a/z.md", "# one\n"),
        ("b.txt", "two\r\nlines "),
    ]


def test_blank_and_undecodable_files_are_left_out_and_reported(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.txt": "ok", "blank.txt": " \n", "latin.txt": b"caf\xe9"})
    skipped: list[tuple] = []
    corpus = open_corpus(str(root))
    assert [document.text for document in corpus.documents(lambda *left: skipped.append(left))] == ["ok"]
    assert skipped == [
        ("blank.txt", Reason.blank, 2),
        ("latin.txt:1", Reason.bad_bytes, 4),
        ("latin.txt", Reason.blank, 4),
    ]
    assert scan(corpus).left_out.count == 3


def test_jsonl_documents_are_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"body": text}) for text in ("one", " ", "two\n", "\ud800")]
    write(tmp_path, {"x.jsonl": "\n".join([*lines[:2], "", *lines[2:]])})
    corpus = open_corpus(str(tmp_path), text_key="body")
    assert corpus.format is CorpusFormat.jsonl
    assert list(corpus.documents()) == [
        Document("x.jsonl:1", "one", "one"),
        Document("x.jsonl:4", "two\n", "two\n"),
    ]


def test_source_tree_takes_globs(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.py": "a", "b/c.py": "c", "b/d.rs": "d", "README.md": "r"})
    assert ids(root, format=CorpusFormat.source) == ["a.py", "b/c.py"]
    assert ids(root, globs=("**/*.rs", "*.md")) == ["README.md", "b/d.rs"]
    assert ids(root / "a.py") == ["a.py"]
    with pytest.raises(UserError, match=r"globs='/etc/\*': not a pattern relative to"):
        ids(root, globs=("/etc/*",))


def test_format_is_inferred_only_where_there_is_one(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.py": "a"})
    assert open_corpus(str(root)).format is CorpusFormat.source
    write(root, {"data.json": "{}", "LICENSE": "l", "b.log": "1", "c.LOG": "2"})
    assert open_corpus(str(root)).paths == ("a.py",)
    assert dict(open_corpus(str(root)).ignored) == {".json": 1, "": 1, ".log": 2}
    write(root, {"notes.md": "n"})
    with pytest.raises(UserError, match="holds text and source files; say which are the corpus: format=\.\.\."):
        open_corpus(str(root))


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or directory"):
        open_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"empty corpus: no file of a known kind \(\.txt \.md \.jsonl .* \.json\);"):
        open_corpus(str(tmp_path))
    with pytest.raises(UserError, match=r"empty corpus: no file of parquet \(\.parquet\)"):
        open_corpus(str(tmp_path), CorpusFormat.parquet)
    with pytest.raises(UserError, match=r"empty corpus: no file matches \*\*/\*\.rs"):
        open_corpus(str(tmp_path), globs=("**/*.rs",))
    with pytest.raises(UserError, match="'stdlib' takes neither"):
        open_corpus("stdlib", globs=("*.py",))


def test_scan_caps_take_the_first_documents(tmp_path: Path) -> None:
    root = write(tmp_path, {f"{name}.txt": name * 4 for name in "abcd"})
    corpus = open_corpus(str(root))
    assert scan(corpus).documents == 4
    assert scan(corpus, max_docs=3).documents == 3
    capped = scan(corpus, max_bytes=11)
    assert (capped.documents, capped.bytes) == (2, 8)
    assert capped.sha256 == scan(corpus, max_docs=2).sha256 != scan(corpus).sha256


def test_scan_digest_follows_content_and_names_not_place(tmp_path: Path) -> None:
    one = scan(open_corpus(str(write(tmp_path / "one", {"a.txt": "x", "b.txt": "yz"}))))
    moved = scan(open_corpus(str(write(tmp_path / "two", {"a.txt": "x", "b.txt": "yz"}))))
    shifted = scan(open_corpus(str(write(tmp_path / "three", {"a.txt": "xy", "b.txt": "z"}))))
    renamed = scan(open_corpus(str(write(tmp_path / "four", {"a.txt": "x", "c.txt": "yz"}))))
    assert one == moved
    assert len({one.sha256, shifted.sha256, renamed.sha256}) == 3


def test_unit_hash_is_frozen_and_uniform() -> None:
    # Frozen: another value would move files between the splits of corpora that exist.
    assert unit_hash("json/decoder.py", 17) == pytest.approx(0.9709545525501105, abs=1e-12)
    values = [unit_hash(str(number), 0) for number in range(4000)]
    assert sum(value < 0.25 for value in values) == pytest.approx(1000, abs=100)
    assert 0 <= min(values) <= max(values) < 1


def test_split_is_by_file_whatever_else_is_there() -> None:
    alone = {f"{number}.py": split_of(Document(f"{number}.py", "x", f"{number}.py"), 0.1, 3) for number in range(300)}
    again = {name: split_of(Document(name, "changed text", name), 0.1, 3) for name in alone}
    assert alone == again
    assert 10 <= sum(split is Split.val for split in alone.values()) <= 60
    assert alone != {name: split_of(Document(name, "x", name), 0.1, 4) for name in alone}


def test_stdlib_is_library_code_only() -> None:
    corpus = open_corpus("stdlib")
    assert corpus.format is CorpusFormat.stdlib
    assert {"argparse.py", "json/decoder.py", "typing.py"} <= set(corpus.paths)
    parts = {part for path in corpus.paths for part in Path(path).parts}
    assert not parts & {"test", "tests", "site-packages", "encodings", "pydoc_data"}
    assert not any("_sysconfigdata" in path for path in corpus.paths)
    assert list(corpus.paths) == sorted(corpus.paths)
    assert all((corpus.root / path).stat().st_size < 1 << 19 for path in corpus.paths)
