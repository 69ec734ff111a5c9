"""The walks of ``docs/architecture.md`` are those that the code takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import Recipe, load_recipe
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed
from tests.project.tracing import Calls, trace

PAGE = Path(__file__).parents[2] / "docs/architecture.md"
TAKEN_BY = {
    "A recipe": ["recipe"],
    "A batch": ["run"],
    "A token": ["run"],
    "A checkpoint": ["run", "resumed run"],
    "An import": ["import"],
}


def walks() -> list[tuple[str, str, list[str]]]:
    """Title, name of the trace, and functions of each numbered list."""
    found = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        lists = re.findall(r"(?:^\d+\. .*\n(?:   .*\n)*)+", text, flags=re.M)
        assert len(lists) == len(TAKEN_BY[title]), title
        for name, steps in zip(TAKEN_BY[title], lists, strict=True):
            functions = re.findall(r"^\d+\. `([\w.]+:[\w.]+)`: ", steps, flags=re.M)
            assert len(functions) == steps.count("\n", 0) - len(re.findall(r"^   ", steps, flags=re.M)), title
            found.append((title, name, [f"moefoundry.{function}" for function in functions]))
    return found


def take(recipe: Recipe, longer: Recipe, directory: Path) -> dict[str, list[str]]:
    """Train, go on, import; names in the order of first entry."""
    from moefoundry.conversion.convert import import_hf
    from moefoundry.trainer import train
    from tests.conversion.hf import family_config, write_hf

    write_hf(directory / "hf", "olmoe", family_config("olmoe"))
    traces: dict[str, Calls] = {}
    with trace() as traces["recipe"]:
        load_recipe(QUICKSTART, ["model.moe.top_k=4"])
    with trace() as traces["run"]:
        train(recipe)
    with trace() as traces["resumed run"]:
        train(longer)
    with trace() as traces["import"]:
        import_hf(directory / "hf", directory / "imported")
    return {name: list(calls) for name, calls in traces.items()}


@pytest.fixture(scope="module")
def traces(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("walks")
    first = tiny_recipe(directory / "run", "save_async=false", "max_duration=2ba")
    longer = tiny_recipe(directory / "run", "save_async=false", "max_duration=3ba", "autoresume=true")
    return run_distributed(take, 1, first, longer, directory)[0]


@pytest.mark.parametrize(("title", "name", "functions"), walks(), ids=lambda value: value if type(value) is str else "")
def test_functions_are_entered_in_this_order(
    traces: dict[str, list[str]], title: str, name: str, functions: list[str]
) -> None:
    taken = Calls(traces[name])
    assert [function for function in functions if function not in taken] == []
    assert sorted(functions, key=taken.index) == functions
    assert taken.has_in_order(*functions)
