"""What is committed: every recipe loads, quickstart.yaml is the schema's defaults, docs/recipe.md is up to date."""

from pathlib import Path

import pytest
import yaml

from moefoundry import config
from moefoundry.config import (
    Recipe,
    load_recipe,
    schema,
    schema_attention,
    schema_lora,
    schema_model,
    schema_monitors,
    schema_parts,
)
from moefoundry.config.reference import reference
from moefoundry.config.spec import plain
from moefoundry.config.tasks import read_tasks

ROOT = Path(__file__).parents[2]
TASKS = sorted((ROOT / "configs" / "tasks").glob("*.yaml"))
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path not in TASKS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.run_name == path.stem
    ranks = recipe.mesh.replicate * recipe.mesh.shard
    assert load_recipe(path, world_size=ranks if ranks > 0 else 2)  # a mesh of its own, or any


@pytest.mark.parametrize("path", TASKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_tasks_loads(path):
    assert all((ROOT / task.dataset_uri).is_file() for task in read_tasks(str(path)))


def test_every_schema_class_is_exported():
    for module in (schema, schema_attention, schema_lora, schema_model, schema_monitors, schema_parts):
        classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
        own = {name for name, value in classes.items() if value.__module__ == module.__name__}
        assert own
        assert own <= set(config.__all__)


def test_there_are_recipes():
    assert ROOT / "configs" / "quickstart.yaml" in RECIPES


def test_quickstart_writes_every_key_out():
    """In the schema's order, interpolations included: the file is where a reader sees what there is."""
    text = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")

    def keys(tree, path=""):
        if not isinstance(tree, dict):
            return [path]
        return [path, *(leaf for name, child in tree.items() for leaf in keys(child, f"{path}.{name}"))]

    assert keys(yaml.safe_load(text)) == [key for key in keys(plain(Recipe())) if key != ".format_version"]


def test_the_reference_page_is_up_to_date():
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m moefoundry.config.reference docs/recipe.md"


def test_the_reference_page_has_every_key():
    page = reference()
    for key in ("`model.moe.router.score_function`", "`loggers.wandb.project`", "`scheduler.alpha_f`", "`ema.decay`"):
        assert key in page
