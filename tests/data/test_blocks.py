"""Blocks: the same bytes for any number of processes and any cut, and a run that goes on after a kill."""

import gzip
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moefoundry.config.errors import UserError
from moefoundry.data import prepare as prepare_module
from moefoundry.data import workers as workers_module
from moefoundry.data.blocks import SMALLEST_PART, plan_blocks
from moefoundry.data.corpus import open_corpus
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.reading import count_lines, lines_between
from moefoundry.data.summary import Layout
from moefoundry.data.survey import survey_block
from moefoundry.data.workers import run_jobs
from moefoundry.data.writing import BlockWriter

BLOCK = 1000


def text_of(number: int) -> str:
    return f"text {number}: " + " ".join(f"{(number + at) * 7919 % 10_007:x}" for at in range(number % 23 + 1))


def write_json_lines(file: Path) -> None:
    """With blank lines, a line that is no JSON, and a line longer than a block."""
    lines = [json.dumps({"text": text_of(number)}) for number in range(120)]
    lines[30], lines[31], lines[90] = "", "{torn", json.dumps({"text": "long " * 1000})
    file.write_text("\n".join(lines))


def write_parquet(file: Path) -> None:
    table = pyarrow.table({"text": [text_of(number) for number in range(120)], "other": [1] * 120})
    pyarrow.parquet.write_table(table, file, row_group_size=7, compression="none")


def write_files(root: Path) -> None:
    root.mkdir()
    for number in range(60):
        (root / f"{number:02d}.txt").write_text(text_of(number))


@pytest.fixture(params=["lines", "parquet", "files"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[[Path], None]
    make, name = {
        "lines": (write_json_lines, "in.jsonl"),
        "parquet": (write_parquet, "in.parquet"),
        "files": (write_files, "in"),
    }[request.param]
    make(tmp_path / name)
    return tmp_path / name


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", SMALLEST_PART * BLOCK)


@pytest.fixture
def options(source: Path, tmp_path: Path) -> PrepareOptions:
    options = PrepareOptions(str(source), tmp_path / "out", vocab_size=300, val_fraction=0.2, max_loss=0.1)
    return replace(options, layout=Layout.documents)


@pytest.fixture
def json_lines(tmp_path: Path) -> PrepareOptions:
    write_json_lines(tmp_path / "in.jsonl")
    options = PrepareOptions(str(tmp_path / "in.jsonl"), tmp_path / "out", vocab_size=300, val_fraction=0.2)
    return replace(options, max_loss=0.1, layout=Layout.documents)


def tree(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_number_of_processes_writes_the_same_bytes(options: PrepareOptions, tmp_path: Path) -> None:
    assert len(plan_blocks(open_corpus(options.source), BLOCK)) >= 3
    prepare(replace(options, workers=1))
    for workers in (2, 7):
        prepare(replace(options, out=tmp_path / f"{workers}", workers=workers))
        assert tree(tmp_path / f"{workers}") == tree(options.out)
    assert not list(tmp_path.glob(".*"))


def test_packed_samples_do_not_depend_on_blocks(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the digest and the names in corpus.json, which are those of the first release."""
    packed = replace(options, layout=Layout.packed, max_seq_len=16)
    prepare(packed)
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", 1 << 30)
    prepare(replace(packed, out=tmp_path / "whole"))
    assert tree(tmp_path / "whole") == tree(options.out)


@pytest.mark.parametrize("caps", [{"max_docs": 50}, {"max_bytes": 4500}])
def test_caps_take_the_first_documents(options: PrepareOptions, caps: dict[str, int]) -> None:
    corpus = prepare(replace(options, **caps)).corpus
    documents = sum(split.documents for split in corpus.splits.values())
    expected = list(open_corpus(options.source).documents())[:documents]
    assert sum(split.bytes for split in corpus.splits.values()) == sum(len(d.text.encode()) for d in expected)
    assert documents == caps.get("max_docs", documents)
    assert corpus.inputs["bytes"] <= caps.get("max_bytes", 10**9)


def test_what_is_left_out_is_named_by_its_line_in_the_file(json_lines: PrepareOptions) -> None:
    assert prepare(json_lines).corpus.left_out["not a JSON object"]["first"] == ["in.jsonl:32"]


def test_parts_of_lines_are_all_lines(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    for content in (b"", b"a", b"a\n", b"\n\nab\n\nc", b"abc\nd\n"):
        file.write_bytes(content)
        expected = content.splitlines(keepends=True)
        for first in range(len(content) + 1):
            for second in range(first, len(content) + 1):
                cuts = [(0, first), (first, second), (second, len(content))]
                parts = [list(lines_between(file, *cut)) for cut in cuts]
                assert [line for part in parts for line in part] == expected, (content, first, second)
                if content:
                    assert [count_lines(file, *cut) for cut in cuts] == [len(part) for part in parts], (content, cuts)


def test_blocks_cover_every_document_once(source: Path) -> None:
    corpus = open_corpus(str(source))
    blocks = plan_blocks(corpus, BLOCK)
    assert [block.number for block in blocks] == list(range(len(blocks)))
    whole = [document.text for document in corpus.documents()]
    assert [d.text for block in blocks for d in corpus.documents(parts=block.slices)] == whole


def test_compressed_files_stay_whole(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "in.jsonl")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes(), mtime=0))
    corpus = open_corpus(str(tmp_path / "packed.jsonl.gz"))
    (block,) = plan_blocks(corpus, 100)
    surveyed, _ = survey_block(corpus, block, lambda documents, size: None)
    assert surveyed.documents == 118


def kill_when(child: int, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_run_that_was_killed_goes_on(
    json_lines: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(replace(json_lines, out=tmp_path / "never killed"))
    blocks = tmp_path / ".out.blocks" / "blocks"
    write = BlockWriter.write

    def slow(self: BlockWriter, job, advance):
        if job.number > 2:
            time.sleep(60)
        return write(self, job, advance)

    child = os.fork()
    if child == 0:
        BlockWriter.write = slow  # type: ignore[method-assign]
        try:
            prepare(replace(json_lines, workers=2))
        finally:
            os._exit(1)
    kill_when(child, lambda: (blocks / "00002.json").exists())
    finished = {file.name for file in blocks.glob("*.json")}
    damaged = next((tmp_path / ".out.blocks" / "train").glob("shard.00001.*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    written: list[int] = []

    def counted(self: BlockWriter, job, advance):
        written.append(job.number)
        return write(self, job, advance)

    monkeypatch.setattr(BlockWriter, "write", counted)
    prepare(replace(json_lines, workers=0))  # so that the calls are seen here
    assert finished >= {"00000.json", "00001.json", "00002.json"}
    assert 1 in written, "a damaged block is made again"
    assert not {0, 2} & set(written), "and one that is whole is not"
    assert tree(json_lines.out) == tree(tmp_path / "never killed")
    assert not list(tmp_path.glob(".*"))


def test_an_error_keeps_what_is_finished(
    json_lines: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "join", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="out: cannot be written: No space left on device"):
            prepare(json_lines)
    assert (tmp_path / ".out.blocks" / "blocks" / "00000.json").exists()
    prepare(replace(json_lines, seed=18))  # another corpus: nothing of that is taken over
    prepare(replace(json_lines, seed=18, out=tmp_path / "fresh"))
    assert tree(json_lines.out) == tree(tmp_path / "fresh")


def test_a_worker_that_is_killed_is_an_error() -> None:
    def job(number: int, advance: workers_module.Advance) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match=r"a worker process ended \(signal 9, perhaps for want of memory\)"):
        run_jobs(job, range(5), 2, lambda documents, size: None, lambda result: None)


def test_errors_and_progress_come_from_the_workers() -> None:
    def job(number: int, advance: workers_module.Advance) -> int:
        advance(1, number)
        if number == 9:
            raise UserError("nine")
        return number * number

    counted: list[tuple[int, int]] = []
    results: list[int] = []
    run_jobs(job, range(9), 3, lambda *more: counted.append(more), results.append)
    assert sorted(results) == [number * number for number in range(9)]
    assert tuple(map(sum, zip(*counted, strict=True))) == (9, sum(range(9)))
    with pytest.raises(UserError, match=r"^nine$"):
        run_jobs(job, range(12), 3, lambda *more: None, results.append)
