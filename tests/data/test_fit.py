"""Data that do not fit a recipe as a whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import ConfigError, Recipe
from moefoundry.data.fit import check_data


def test_held_out_data_of_another_tokenizer_are_refused(
    tiny_recipe: Callable[..., Recipe], tiny_corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_corpus, other)
    check_data(tiny_recipe(tmp_path / "run", f"eval_loader.dataset.local={other}"))
    summary = json.loads((other / "corpus.json").read_text())
    (other / "corpus.json").write_text(json.dumps(summary | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"eval_loader\.dataset\.local: has another tokenizer than train_loader"):
        check_data(tiny_recipe(tmp_path / "run", f"eval_loader.dataset.local={other}"))
