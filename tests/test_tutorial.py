"""The tutorial is followed word by word, in a copy of the repository that holds only what a reader needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = "make setup && . .venv/bin/activate\n"
"""The first block; the environment that the tests run in stands for it."""


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block that the tutorial has for a shell or for Python, in order."""
    return re.findall(
        r"^```(bash|python)\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL | re.MULTILINE
    )


def test_the_tutorial_begins_with_the_environment() -> None:
    assert blocks()[0] == ("bash", SETUP)
    assert {language for language, _ in blocks()} == {"bash", "python"}
    for language, text in blocks():
        if language == "python":
            compile(text, "tutorial.md", "exec")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_ends_with_an_exported_model(tmp_path: Path) -> None:
    for name in ("configs", "scripts", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for language, text in blocks()[1:]:
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    lines = [json.loads(line) for line in (tmp_path / "runs/tutorial/metrics.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == list(range(1, 61))
    losses = [line["loss/train/lm"] for line in lines]
    assert sum(losses[-5:]) < sum(losses[:5]), "it learned"
    assert list((tmp_path / "sweeps/top-k").glob("*.csv"))
    assert {path.suffix for path in (tmp_path / "exported").iterdir()} >= {".json", ".safetensors"}
