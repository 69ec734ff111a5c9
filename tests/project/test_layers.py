"""The layer order holds for the package, and its contracts bite: tried on a skeleton with the same modules."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(tree / "src"), "COLUMNS": "200"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def contracts() -> dict[str, dict]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return {contract["id"]: contract for contract in tomllib.load(file)["tool"]["importlinter"]["contracts"]}


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """A package with every layer as an empty module, under this project's contracts."""
    package = tmp_path / "src/moefoundry"
    package.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name in ("__init__", "__main__", *contracts()["layers"]["layers"]):
        (package / f"{name}.py").touch()
    (package / "cli.py").unlink()
    (package / "cli").mkdir()
    for name in ("__init__", "generate"):
        (package / "cli" / f"{name}.py").touch()
    return tmp_path


def test_package_keeps_the_layer_order() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_downward_imports_pass(skeleton: Path) -> None:
    (skeleton / "src/moefoundry/trainer.py").write_text("import composer\nimport moefoundry.config\n")
    result = lint_imports(skeleton)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "report"),
    [
        ("ops", "from moefoundry.moe import router", "moefoundry.ops is not allowed to import moefoundry.moe"),
        ("parallel", "import composer", "moefoundry.parallel is not allowed to import composer"),
        (
            "cli/generate",
            "from moefoundry import conversion",
            "generate is not allowed to import moefoundry.conversion",
        ),
        ("utils", "", "moefoundry.utils"),
    ],
    ids=["upward", "composer-in-core", "conversion-in-generate", "unlisted-module"],
)
def test_violations_fail(skeleton: Path, module: str, line: str, report: str) -> None:
    (skeleton / f"src/moefoundry/{module}.py").write_text(line + "\n")
    result = lint_imports(skeleton)
    assert result.returncode == 1
    assert report in result.stdout


def test_every_layer_is_required(skeleton: Path) -> None:
    (skeleton / "src/moefoundry/foundry.py").unlink()
    result = lint_imports(skeleton)
    assert result.returncode == 1
    assert "moefoundry.foundry does not exist" in result.stdout
