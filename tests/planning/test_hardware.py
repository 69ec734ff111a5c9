"""The recipes of ``configs/hardware/``: each is valid for its number of devices, fits, and has its row in the docs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs/hardware").glob("*.yaml"))
UNFIT = {
    "flexolmo-7x7b",  # its 7 experts cannot be divided among 8 ranks, so ranks hold whole ones
}
NAME = re.compile(r"(.+)-(\d+)xh100-(bf16|fp8)")


def read(file: Path) -> tuple[Recipe, int]:
    name = NAME.fullmatch(file.stem)
    assert name is not None
    return load_recipe(str(file), [], int(name[2])), int(name[2])


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location("hardware", ROOT / "docs/hardware.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hardware"] = module
    spec.loader.exec_module(module)
    return module


def test_each_is_valid_and_in_the_table() -> None:
    text = (ROOT / "docs/hardware.md").read_text()
    published_of = {path.stem: load_recipe(str(path), []) for path in (ROOT / "configs/pretrain").glob("*.yaml")}
    named = [NAME.fullmatch(file.stem) for file in FILES]
    assert {name[1] for name in named if name} == published_of.keys() - UNFIT
    for file in FILES:
        recipe, devices = read(file)
        name = NAME.fullmatch(file.stem)
        assert name is not None
        published = published_of[name[1]]
        assert recipe.model == published.model
        assert recipe.global_train_batch_size == published.global_train_batch_size
        assert recipe.mesh.replicate * recipe.mesh.shard == devices
        assert (recipe.precision.fp8.recipe is not None) == (name[3] == "fp8")
        assert f"configs/hardware/{file.name}) | {devices} |" in text


@pytest.mark.parametrize("file", FILES[:: len(FILES) // 8], ids=lambda file: file.stem)
def test_its_row_is_what_estimate_says(page: Any, file: Path) -> None:
    assert_row(page, file)


def test_the_table_of_uses_is_what_estimate_says(page: Any) -> None:
    assert page.uses() in page.PAGE.read_text()


@pytest.mark.slow
def test_every_row_is_what_estimate_says(page: Any) -> None:
    for file in FILES:
        assert_row(page, file)


def assert_row(page: Any, file: Path) -> None:
    name = NAME.fullmatch(file.stem)
    assert name is not None
    case = page.Case(name[1], int(name[2]), name[3])
    row = page.row(case)
    assert row in page.PAGE.read_text()
    assert float(row.split("|")[7]) * page.GIB <= page.LIMIT + page.GIB
