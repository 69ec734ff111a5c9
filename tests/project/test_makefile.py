"""The Makefile's targets run what they say; `setup` is repeatable, redone after a change, and safe to interrupt.

`setup` runs here with a stand-in for Python that records what it is asked to do. The real thing is what brought the
tests here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING_PYTHON = "/nonexistent/python"

# Stands for Python, and is what `-m venv` leaves as bin/python. Appends its arguments to $LOG; fails on $FAIL_ON.
FAKE_PYTHON = """#!/bin/sh
case "$1" in -c) exit 0;; --version) echo "Python 3.11.0"; exit 0;; esac
echo "$@" >> "$LOG"
case "$*" in *"${FAIL_ON:-no such argument}"*) exit 1;; esac
previous=
for argument; do
    if [ "$previous" = "--target" ]; then mkdir -p "$argument"; fi
    previous=$argument
done
if [ "$1 $2" = "-m venv" ]; then
    for venv; do :; done
    mkdir -p "$venv/bin"; touch "$venv/pyvenv.cfg"; cp "$0" "$venv/bin/python"
fi
"""


class Project:
    """A copy of the Makefile beside an empty lock, with a recording stand-in for Python."""

    def __init__(self, tree: Path):
        self.tree = tree
        self.log = tree / "log"
        self.python = tree / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        shutil.copy(ROOT / "Makefile", tree)
        (tree / "requirements.lock").touch()
        (tree / "requirements-oracle.lock").touch()
        (tree / "requirements-docs.lock").touch()
        (tree / "requirements-oldest.lock").touch()
        (tree / "pyproject.toml").touch()

    def make(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", "VENV=env", f"PYTHON={self.python}", *arguments],
            cwd=self.tree,
            env={**inherited, "LOG": str(self.log), "VIRTUAL_ENV": "", **env},
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def installs(self) -> list[str]:
        return [call.split(" install ")[1] for call in self.calls if " install " in call]


BOTH_INSTALLS = ["-q --no-deps -r requirements.lock", "-q --no-deps --no-build-isolation -e ."]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def ready(project: Project) -> Project:
    result = project.make("setup")
    assert result.returncode == 0, result.stderr
    return project


LINT = ["ruff check", "ruff format --check", "mypy", "lint-imports", "hadolint Dockerfile"]
QUICKSTART = [
    "moefoundry prepare stdlib data/quickstart",
    "composer -n 2 scripts/train.py configs/quickstart.yaml",
]


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("test", [*LINT, "python -m pytest"]),
        ("test-slow", ["python -m pytest -m slow"]),
        ("test-oldest", ["python -m pytest"]),
        ("quickstart", QUICKSTART),
        ("bench", ["python -m benchmarks.run"]),
        ("docs", ["python -m moefoundry.config.reference", "python docs/architecture.py"]),
        ("site", ["python -m mkdocs build"]),
    ],
)
def test_targets_set_up_first_and_use_the_environment(project: Project, target: str, commands: list[str]) -> None:
    result = project.make("-n", target, "ARGS=--extra")
    assert result.returncode == 0, result.stderr
    expected = ["install -q --no-deps -r requirements.lock", *(f"env/bin/{command}" for command in commands)]
    positions = [result.stdout.find(command) for command in expected]
    assert -1 not in positions, list(zip(expected, positions, strict=True))
    assert positions == sorted(positions)
    assert ("--extra" in result.stdout) == (target not in {"docs", "site"})


def test_failing_lint_fails_test(ready: Project) -> None:
    ruff = ready.tree / "env/bin/ruff"
    ruff.write_text("#!/bin/sh\nexit 1\n")
    ruff.chmod(0o755)
    assert ready.make("test").returncode != 0
    assert "-m pytest" not in ready.calls


def test_setup_creates_then_installs(project: Project) -> None:
    result = project.make("setup")
    assert result.returncode == 0, result.stderr
    assert project.calls[0] == "-m venv --clear env"
    assert project.installs == BOTH_INSTALLS


def test_second_setup_does_nothing(ready: Project) -> None:
    result = ready.make("setup")
    assert result.returncode == 0
    assert ready.calls == []
    assert result.stdout == ""


@pytest.mark.parametrize("file", ["requirements.lock", "pyproject.toml"])
def test_setup_is_redone_after_a_change(ready: Project, file: str) -> None:
    (ready.tree / file).write_text("# changed\n")
    assert ready.make("setup").returncode == 0
    assert ready.installs == BOTH_INSTALLS
    assert not any("venv" in call for call in ready.calls), "the environment itself is kept"
    assert ready.make("setup").returncode == 0
    assert ready.calls == []


@pytest.mark.parametrize("failing_step", ["-r requirements.lock", "-e ."])
def test_interrupted_setup_is_redone(project: Project, failing_step: str) -> None:
    assert project.make("setup", FAIL_ON=failing_step).returncode != 0
    assert project.make("setup").returncode == 0
    assert project.installs == BOTH_INSTALLS


def test_interrupted_update_is_redone_even_if_the_change_is_undone(ready: Project) -> None:
    (ready.tree / "requirements.lock").write_text("# changed\n")
    assert ready.make("setup", FAIL_ON="-r requirements.lock").returncode != 0
    (ready.tree / "requirements.lock").write_text("")
    assert ready.make("setup").returncode == 0
    assert ready.installs == BOTH_INSTALLS


def test_moved_environment_is_made_anew(ready: Project) -> None:
    (ready.tree / "env").rename(ready.tree / "moved")
    assert ready.make("setup", "VENV=moved").returncode == 0
    assert ready.calls[0] == "-m venv --clear moved"


@pytest.mark.parametrize(
    ("target", "directory", "lock_name"),
    [("oracle", ".oracle", "requirements-oracle.lock"), ("mkdocs", ".mkdocs", "requirements-docs.lock")],
)
def test_what_lies_beside_the_environment_is_installed_once_for_each_lock_and_whole(
    ready: Project, target: str, directory: str, lock_name: str
) -> None:
    place, lock = ready.tree / directory, ready.tree / lock_name
    assert ready.make(target, FAIL_ON="--target").returncode != 0
    assert not place.exists()
    for text in ("transformers==5", "transformers==6"):
        lock.write_text(text)
        (place / text).parent.mkdir(exist_ok=True)
        (place / text).touch()
        assert ready.make(target).returncode == 0
        assert ready.installs == [f"-q --no-deps --target {directory}.tmp -r {lock_name}"]
        assert [path.name for path in place.iterdir()] == [".stamp"]
        assert ready.make(target).returncode == 0
        assert ready.installs == []
    assert not (ready.tree / f"{directory}.tmp").exists()


def test_setup_leaves_a_directory_that_is_no_environment_alone(project: Project) -> None:
    precious = project.tree / "env/precious.txt"
    precious.parent.mkdir()
    precious.write_text("keep me")
    result = project.make("setup")
    assert result.returncode != 0
    assert "env is not a virtual environment" in result.stderr
    assert precious.read_text() == "keep me"


def test_setup_without_a_recent_python_says_so(project: Project) -> None:
    old = project.tree / "bin/python3"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    path = f"{old.parent}:{os.environ['PATH']}"
    result = project.make("setup", f"PYTHON={MISSING_PYTHON}", PATH=path)
    assert result.returncode != 0
    assert f"neither {MISSING_PYTHON} nor python3 is Python 3.11 or newer" in result.stderr
    assert not (project.tree / "env").exists()


def test_clean_keeps_environment_runs_and_data(ready: Project) -> None:
    kept = [ready.tree / name for name in ("runs/a/metrics.jsonl", "data/quickstart/index.json", "src/data/a.py")]
    removed = [ready.tree / name for name in ("build/x", ".mypy_cache/x", "src/data/__pycache__/x", "src/m.egg-info/x")]
    for path in kept + removed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert ready.make("clean").returncode == 0
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in removed)
    assert ready.make("setup").returncode == 0
    assert ready.calls == []


def test_help_lists_every_target(project: Project) -> None:
    listed = {line.split()[0] for line in project.make().stdout.splitlines()}
    assert listed == {
        *(
            "help",
            "setup",
            "oracle",
            "oldest",
            "mkdocs",
            "quickstart",
            "test",
            "test-slow",
            "test-oldest",
            "lint",
            "bench",
            "docs",
            "site",
            "docker",
        ),
        "clean",
    }
