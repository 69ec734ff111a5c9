"""The Python API: the page's example runs as it stands, and what lies at a place is found out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moefoundry
from moefoundry.checkpoint.remote import upload_checkpoint
from moefoundry.config import UserError
from tests.distributed import captured_output, run_distributed

ROOT = Path(__file__).parents[1]


def run_example(directory: Path) -> tuple[str, dict[str, list[Any]], list[str]]:
    """What the example prints, the logits of its model at three places, and what goes wrong at others."""
    import moefoundry

    os.chdir(directory)
    Path("configs").symlink_to(ROOT / "configs")
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    with captured_output() as texts:
        exec(compile(code, "docs/python.md", "exec"), names)
    run_dir = Path(names["recipe"].run_dir)
    upload_checkpoint(run_dir / "checkpoints/ba4", f"file://{directory}/uploads")
    places = [run_dir, run_dir / "checkpoints/ba4", f"file://{directory}/uploads"]
    ids = torch.tensor([[1, 2, 3]])
    logits = {str(place): moefoundry.from_pretrained(place)(ids).tolist() for place in places}
    errors = []
    for place, options in ((directory, {}), (directory / "none", {}), (run_dir, {"ema": True}), ("q9://x", {})):
        with pytest.raises(UserError) as caught:
            moefoundry.from_pretrained(place, **options)
        errors.append(str(caught.value))
    missing = moefoundry.load_recipe("configs/quickstart.yaml", ["train_loader.dataset.local=none", "run_dir=other"])
    with pytest.raises(UserError) as caught:
        moefoundry.train(missing)
    return texts[0], logits, [*errors, str(caught.value)]


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    out, logits, errors = run_distributed(run_example, 1, tmp_path)[0]
    assert re.search(r"^ba4 0\.004 def ", out, re.MULTILINE)
    first, *others = logits.values()
    assert all(other == first for other in others)
    for error, words in zip(
        errors,
        ["no complete checkpoint", "no such checkpoint, run or Hugging Face directory", "ema", "q9", "none"],
        strict=True,
    ):
        assert words in error
        assert "load_path" not in error
        assert "\n" not in error or words == "none"


def test_every_name_is_there_and_none_is_imported_before_its_use() -> None:
    assert set(moefoundry.__all__) <= set(dir(moefoundry))
    assert callable(moefoundry.prepare)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        moefoundry.Trainer  # noqa: B018
    script = (
        "import sys, moefoundry; from moefoundry import Recipe, load_recipe, PrepareOptions\n"
        "heavy = {'torch', 'composer', 'llmfoundry', 'streaming', 'transformers'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
