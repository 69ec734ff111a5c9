"""Read and check in-context tasks and gauntlets, which a recipe holds itself or names as a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moefoundry.config.build import Builder
from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.files import read_tree
from moefoundry.config.parts import TABLES
from moefoundry.config.schema_tasks import BenchmarkConfig, CategoryConfig, GauntletConfig, TaskConfig
from moefoundry.config.spec import filled, join, show
from moefoundry.config.urls import expanded, path_problem
from moefoundry.registry import PartError

TASKS_KEY, GAUNTLET_KEY = "icl_tasks", "eval_gauntlet"
FORMER_PRELIMITER = "question_prelimiter"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Category:
    """Category of a gauntlet.

    Attributes:
        name: Its name.
        benchmarks: Tasks that it averages.
    """

    name: str
    benchmarks: list[BenchmarkConfig]


@dataclass(frozen=True)
class Gauntlet:
    """Averages of tasks.

    Attributes:
        cfg: Rules of the averages.
        categories: Averages of tasks.
        averages: Averages of categories, by name.
    """

    cfg: GauntletConfig
    categories: list[Category]
    averages: dict[str, list[str]]


def read_tasks(value: Any) -> list[TaskConfig]:
    """Read ``icl_tasks``: a list of mappings, or the path of a YAML file that has such a list at this key.

    Raises:
        ConfigError: The file cannot be read, or a task has wrong keys; with every problem.
    """
    return _checked(value, TASKS_KEY, _tasks)


def read_gauntlet(value: Any) -> Gauntlet:
    """Read ``eval_gauntlet``: a mapping, or the path of a YAML file that has such a mapping at this key.

    Raises:
        ConfigError: As :func:`read_tasks`.
    """
    return _checked(value, GAUNTLET_KEY, _gauntlet)


def problems_of(value: Any, read: Callable[[Any], Any]) -> Iterator[Problem]:
    """Yield what is wrong with a value that stands in the recipe; a file is read when it is used."""
    try:
        if not isinstance(value, str):
            read(value)
        elif problem := path_problem(value):
            raise ConfigError([Problem(TASKS_KEY if read is read_tasks else GAUNTLET_KEY, f"{show(value)}: {problem}")])
    except ConfigError as error:
        yield from error.problems


def _checked(value: Any, key: str, build: Callable[[Any, Builder], _T]) -> _T:
    source = "recipe"
    if isinstance(value, str):
        source = expanded(value)
        if not Path(source).is_file():
            raise ConfigError([Problem(key, f"{source}: no such file")], source)
        tree = read_tree(Path(source))
        if key not in tree:
            raise ConfigError([Problem(key, "missing", allowed="a file with this key, as LLM Foundry's are")], source)
        value = tree[key]
    builder = Builder()
    built = build(value, builder)
    if builder.problems:
        raise ConfigError(builder.problems, source)
    return built


def _tasks(value: Any, builder: Builder) -> list[TaskConfig]:
    tasks = [_task(mapping, path, builder) for mapping, path in _mappings(value, TASKS_KEY, builder)]
    built = [task for task in tasks if task is not None]
    labels = [task.label for task in built if isinstance(task.label, str)]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        builder.problems.append(Problem(TASKS_KEY, f"label {show(label)} stands at several tasks", "another label"))
    return built


def _task(mapping: dict[str, Any], path: str, builder: Builder) -> TaskConfig | None:
    table, kind = TABLES["icl_task_types"], mapping.get("icl_task_type")
    try:
        part = table.find(kind) if isinstance(kind, str) else None
    except PartError as error:
        builder.problems.append(Problem(join(path, "icl_task_type"), f"{kind}: {error}"))
        return None
    if FORMER_PRELIMITER in mapping:
        if "prelimiter" in mapping:
            builder.problems.append(Problem(join(path, FORMER_PRELIMITER), "is another name of prelimiter; give one"))
        mapping = {"prelimiter" if name == FORMER_PRELIMITER else name: value for name, value in mapping.items()}
    cls: type[TaskConfig] = part.config if part is not None and part.config is not None else TaskConfig
    task: TaskConfig = builder.build(cls, filled(cls(), mapping), path)
    if part is not None and not builder.problems and not task.num_fewshot:
        builder.problems.append(Problem(join(path, "num_fewshot"), "is empty", "a list of integers >= 0"))
    return task


def _gauntlet(value: Any, builder: Builder) -> Gauntlet:
    if not isinstance(value, dict):
        raise ConfigError([Problem(GAUNTLET_KEY, f"got {show(value)}", "a mapping, or the path of a YAML file")])
    cfg: GauntletConfig = builder.build(GauntletConfig, filled(GauntletConfig(), value), GAUNTLET_KEY)
    categories = []
    for mapping, path in _mappings(cfg.categories, join(GAUNTLET_KEY, "categories"), builder):
        category: CategoryConfig = builder.build(CategoryConfig, mapping, path)
        items = _mappings(category.benchmarks, join(path, "benchmarks"), builder)
        benchmarks = [builder.build(BenchmarkConfig, filled(BenchmarkConfig(), item), where) for item, where in items]
        categories.append(Category(category.name, benchmarks))
    if cfg.rescale_accuracy and not cfg.subtract_random_baseline:
        message = "true, but subtract_random_baseline is false"
        builder.problems.append(Problem(join(GAUNTLET_KEY, "rescale_accuracy"), message, "false"))
    return Gauntlet(cfg, categories, _averages(cfg.averages, [category.name for category in categories], builder))


def _averages(value: Any, names: list[str], builder: Builder) -> dict[str, list[str]]:
    path = join(GAUNTLET_KEY, "averages")
    if value is None:
        return {"default_average": names}
    if not isinstance(value, dict) or not all(isinstance(each, list) for each in value.values()):
        builder.problems.append(Problem(path, f"got {show(value)}", "a mapping from names to lists of categories"))
        return {}
    for name, members in value.items():
        if name in names:
            builder.problems.append(Problem(join(path, name), "is the name of a category, too", "another name"))
        for member in members:
            if member not in names:
                builder.problems.append(Problem(join(path, name), f"no category {show(member)}", ", ".join(names)))
    return {name: [str(member) for member in members] for name, members in value.items()}


def _mappings(value: Any, path: str, builder: Builder) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each mapping of a list with its path, and note what is none."""
    if value is ...:  # the list is missing, which is noted
        return
    if not isinstance(value, list):
        builder.problems.append(Problem(path, f"got {show(value)}", "a list of mappings"))
        return
    for index, item in enumerate(value):
        where = join(path, index)
        if isinstance(item, dict):
            yield item, where
        else:
            builder.problems.append(Problem(where, f"got {show(item)}", "a mapping"))
