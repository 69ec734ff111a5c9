"""configs/quickstart.yaml on two streams with fill-in-the-middle, killed and started again: the same bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.data.formats import CorpusFormat
from moefoundry.data.options import PrepareOptions
from moefoundry.data.prepare import prepare
from moefoundry.data.summary import Layout
from tests.train.runs import Run, finished
from tests.train.test_restarts import ROOT, wait_for_batch

BATCHES, SAVED = 14, 4
CURRICULUM = "curriculum={short: {until: 10000tok, max_seq_len: 256}, long: {}}"  # ten batches of 4 x 256, then 512


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As docs/reading.md prepares them, but of fewer documents."""
    root = tmp_path_factory.mktemp("quickstart")
    code = PrepareOptions("stdlib", root / "code", vocab_size=4096, layout=Layout.documents, max_docs=80)
    prepare(code)
    text = replace(code, source=str(ROOT / "docs"), out=root / "text", tokenizer=root / "code" / "tokenizer")
    prepare(replace(text, max_docs=None, format=CorpusFormat.text))
    return root


def command(streams: Path, run_dir: Path, *changes: str) -> list[str]:
    places = {"code": 0.7, "text": 0.3}
    mixture = ", ".join(f"{name}: {{local: {streams}/{name}, proportion: {share}}}" for name, share in places.items())
    keys = (
        *(f"train_loader.dataset.streams={{{mixture}}}", "train_loader.dataset.fim={}", f"run_dir={run_dir}"),
        f"train_loader.dataset.local={streams}/code",
        *(f"max_duration={BATCHES}ba", f"save_interval={SAVED}ba", "eval_interval=7ba", "eval_subset_num_batches=2"),
        *("callbacks.report=null", "autoresume=true", *changes),
    )
    return [sys.executable, "-m", "moefoundry", "train", "configs/quickstart.yaml", *keys]


def run_until(arguments: list[str], run_dir: Path, batch: int | None) -> Run:
    """Run a command; SIGKILL for all its processes once it has done ``batch``."""
    with (run_dir.parent / f"{run_dir.name}.txt").open("ab") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            process_group=0,
        )
        try:
            if batch is not None:
                wait_for_batch(process, run_dir, batch)
            else:
                assert process.wait(400) == 0, (run_dir.parent / f"{run_dir.name}.txt").read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return finished(run_dir)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stages", ["curriculum=null", CURRICULUM], ids=["alike", "curriculum"])
def test_a_killed_quickstart_goes_on_bit_for_bit(streams: Path, tmp_path: Path, stages: str) -> None:
    """The killed run reads in a loader process, the other in its rank."""
    whole = run_until(command(streams, tmp_path / "whole", stages), tmp_path / "whole", None)
    again = command(streams, tmp_path / "killed", stages, "train_loader.num_workers=1")
    killed = run_until(again, tmp_path / "killed", 9)
    assert 9 <= killed.metrics[-1]["batch"] < BATCHES, "killed in the middle"
    resumed = run_until(again, tmp_path / "killed", None)
    assert "resumed from" in (tmp_path / "killed.txt").read_text()
    assert resumed.exact() == whole.exact()
    assert len(whole.exact()) == BATCHES
    for key in ("tokens/code", "tokens/text", "data/padding", "metrics/eval/LanguageCrossEntropy"):
        assert resumed.column(key) == whole.column(key)
        assert whole.column(key), key
