"""A corpus in parts: the shards of one process, bit for bit, whoever prepares which part and when."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.config.errors import UserError
from moefoundry.data import prepare as prepare_module
from moefoundry.data.options import Part, PrepareOptions
from moefoundry.data.parts import merge_parts, prepare_part
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import Layout
from moefoundry.data.tokenizer import train_tokenizer


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareOptions:
    """A corpus of several blocks, one of whose lines is left out in each of two of them."""
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", 32_000)
    lines = [json.dumps({"text": f"text {number}: " + "word " * (number % 13 + 1)}) for number in range(200)]
    lines[20] = lines[150] = lines[151] = lines[152] = "{torn"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    train_tokenizer(["text word 0123456789"], 270).save(tmp_path / "tokenizer")
    options = PrepareOptions(str(tmp_path / "in.jsonl"), tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    return replace(options, layout=Layout.documents, val_fraction=0.2, max_loss=0.05, workers=0)


def tree(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("count", [1, 3, 20])
def test_parts_in_any_order_are_the_whole(options: PrepareOptions, tmp_path: Path, count: int) -> None:
    """With 20 parts some are empty."""
    prepare(replace(options, out=tmp_path / "whole"))
    for number in reversed(range(1, count + 1)):
        prepare_part(options, Part(number, count))
    merged = merge_parts(options.out)
    assert tree(options.out) == tree(tmp_path / "whole")
    assert merged.corpus.left_out["not a JSON object"]["first"] == ["in.jsonl:21", "in.jsonl:151", "in.jsonl:152"]
    assert prepare(options).up_to_date
    assert not list(tmp_path.glob(".*"))


def test_missing_parts_are_named(options: PrepareOptions) -> None:
    with pytest.raises(UserError, match="out: no parts of it were prepared"):
        merge_parts(options.out)
    prepare_part(options, Part(2, 4))
    with pytest.raises(UserError, match="out: 3 of 4 parts are not finished: 1/4, 3/4, 4/4"):
        merge_parts(options.out)
    there = tree(options.out.parent)
    with pytest.raises(
        UserError, match=r"part=1/2: .*out has part 2/4 already; give part=I/4, or remove .*\.out\.blocks"
    ):
        prepare_part(options, Part(1, 2))
    assert tree(options.out.parent) == there
    record = options.out.parent / ".out.blocks" / "blocks" / "part-00002-of-00004.json"
    shutil.copy(record, record.with_name("part-00001-of-00002.json"))  # of one that was begun at the same time
    with pytest.raises(UserError, match=r"out: parts of 2 and of 4 parts in .*with one N, and no others"):
        merge_parts(options.out)
    record.with_name("part-00001-of-00002.json").unlink()
    for number in (1, 3, 4):
        prepare_part(options, Part(number, 4))
    for text in ("{", '{"number": 2}', "[" * 100_000):
        record.write_text(text)
        with pytest.raises(
            UserError, match=r"part-00002-of-00004\.json: cannot be read: .*; delete it and prepare that"
        ):
            merge_parts(options.out)
    record.unlink()
    prepare_part(options, Part(2, 4))
    assert not merge_parts(options.out).up_to_date


def test_other_tokenizers_options_and_files_do_not_mix(options: PrepareOptions, tmp_path: Path) -> None:
    prepare_part(options, Part(1, 2))
    train_tokenizer(["text word 0123456789"], 265).save(tmp_path / "other")
    prepare_part(replace(options, tokenizer=tmp_path / "other"), Part(2, 2))
    with pytest.raises(UserError, match=r"parts 1 and 2 are not of one corpus; tokenizer_sha256: \w+ and \w+$"):
        merge_parts(options.out)
    prepare_part(replace(options, seed=18), Part(2, 2))
    with pytest.raises(UserError, match="not of one corpus; seed: 17 and 18"):
        merge_parts(options.out)
    with Path(options.source).open("a") as file:
        file.write("\n" * 2000)
    prepare_part(options, Part(2, 2))
    with pytest.raises(UserError, match="not of one corpus; files of the source"):
        merge_parts(options.out)


def test_a_block_that_is_gone_is_named(options: PrepareOptions, tmp_path: Path) -> None:
    for number in (1, 2):
        prepare_part(options, Part(number, 2))
    record = tmp_path / ".out.blocks" / "blocks" / "00001.json"
    record.rename(tmp_path / "kept")
    with pytest.raises(UserError, match="out: block 1 is gone or was written anew; prepare its part again"):
        merge_parts(options.out)
    prepare_part(options, Part(1, 2))
    merge_parts(options.out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": Layout.packed}, "part=1/2: parts are documents, .*: layout=documents"),
        ({"tokenizer": None}, r"part=1/2: needs tokenizer=\.\.\."),
        ({"max_docs": 5}, r"part=1/2: neither with max_docs=\.\.\."),
    ],
)
def test_what_parts_cannot_have(options: PrepareOptions, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_part(replace(options, **change), Part(1, 2))
    assert not list(options.out.parent.glob(".*"))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_parts_that_there_are_not(text: str) -> None:
    with pytest.raises(UserError, match=f"part={text}: (two numbers|the first)"):
        Part.named(text)


def test_the_command_line(options: PrepareOptions, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prepare", options.source, str(options.out), "--layout=documents", "--max-loss=.05"]
    assert main([*line, "--part=1/2"]) == 2
    assert "--part 1/2: needs --tokenizer" in capsys.readouterr().err
    for number in (1, 2):
        assert main([*line, f"--part={number}/2", f"--tokenizer={options.tokenizer}"]) == 0
    assert f"moefoundry prepare merge {options.out}" in capsys.readouterr().out
    assert main(["prepare", "merge", str(options.out), "--seed=3"]) == 2
    assert "`merge OUT` joins parts, and takes no --seed" in capsys.readouterr().err
    assert main(["prepare", "merge", str(options.out)]) == 0
    assert "out: prepared (vocabulary" in capsys.readouterr().out
    assert main([*line, "--part=1/2", f"--tokenizer={options.tokenizer}"]) == 2
    assert "out: is there already; choose another OUT, or --overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ray_cluster_whose_worker_is_killed(options: PrepareOptions, tmp_path: Path) -> None:
    """The first attempt at the third part kills its process, with a block of it written."""
    pytest.importorskip("ray", reason="ray is not installed")
    from moefoundry.data.ray_tasks import prepare_with_ray

    prepare(replace(options, out=tmp_path / "whole"))
    once = tmp_path / "killed"
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(once=str(once)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        prepared = prepare_with_ray(options, "local")
    assert once.exists(), "a worker was killed"
    assert not prepared.up_to_date
    assert tree(options.out) == tree(tmp_path / "whole")


KILLER = """
import os, signal
import moefoundry.data.prepare as prepare
prepare.BLOCK_BYTES = 32_000
import moefoundry.data.ray_tasks as ray_tasks
from moefoundry.data.writing import BlockWriter
write = BlockWriter.write
def write_or_die(self, job, advance):
    record = write(self, job, advance)
    if job.number == 3 and not os.path.exists({once!r}):
        open({once!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return record
BlockWriter.write = write_or_die
"""
