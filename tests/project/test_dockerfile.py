"""The Dockerfile is linted, and its installation steps run here, outside Docker, word for word.

Only the base image, apt and the user account are left out. No network is used and nothing large is installed a second
time: the virtual environment that the steps create sees this one's packages, so `pip install -r requirements.lock`
succeeds only if every pin is what the tests run with, and the package itself is then really built and installed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

from tests.project.test_dependencies import NOT_LOCKED

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"(?P<name>[a-z0-9]+(-[a-z0-9]+)*)==(?P<version>[0-9][0-9A-Za-z.+!]*)")


def lock_lines() -> list[str]:
    return (ROOT / "requirements.lock").read_text().splitlines()


def docker_instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield (keyword, arguments) of each instruction, comments dropped and continuation lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, _, arguments = line.strip().partition(" ")
            yield keyword, arguments.strip()


def docker_ignore() -> Callable[[str, list[str]], set[str]]:
    """Return .dockerignore as a filter for `shutil.copytree` (the two kinds of patterns that it uses)."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    anywhere = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    at_root = [pattern for pattern in patterns if not pattern.startswith("**/")]

    def ignored(directory: str, names: list[str]) -> set[str]:
        here = at_root if Path(directory) == ROOT else []
        return {name for name in names if any(fnmatch(name, pattern) for pattern in anywhere + here)}

    return ignored


class Image:
    """Carries out a Dockerfile's steps below a directory that stands for the image's root."""

    def __init__(self, root: Path):
        self.root = root
        self.workdir = root
        self.ran: list[str] = []
        self.left_out: list[str] = []
        python3 = root / "usr/bin/python3"
        python3.parent.mkdir(parents=True)
        python3.write_text(f'#!/bin/sh\nexec {shlex.quote(sys._base_executable)} "$@"\n')
        python3.chmod(0o755)
        self.env = {
            "PATH": f"{python3.parent}:/usr/bin:/bin",
            "HOME": str(root),
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def build(self, dockerfile: str) -> None:
        text = dockerfile.replace("/opt/", f"{self.root}/opt/")
        for keyword, arguments in docker_instructions(text):
            match keyword:
                case "ENV":
                    for assignment in shlex.split(arguments):
                        name, _, value = assignment.partition("=")
                        self.env[name] = string.Template(value).substitute(self.env)
                case "WORKDIR":
                    self.workdir = Path(arguments)
                    self.workdir.mkdir(parents=True)
                case "COPY":
                    self.copy(*arguments.split())
                case "RUN":
                    self.run(arguments)
                case _:
                    assert keyword in {"FROM", "USER", "ENTRYPOINT", "CMD"}, f"no rule for {keyword}"

    def copy(self, source: str, target: str) -> None:
        origin, destination = ROOT / source, self.workdir / target
        if origin.is_dir():
            shutil.copytree(origin, destination, ignore=docker_ignore(), dirs_exist_ok=True)
        else:
            shutil.copy(origin, destination)

    def run(self, command: str) -> None:
        if command.startswith(("apt-get ", "useradd ")):
            self.left_out.append(command)
            return
        subprocess.run(["/bin/sh", "-euc", command], cwd=self.workdir, env=self.env, check=True)
        self.ran.append(command)
        if "-m venv" in command:
            self.share_packages()

    def share_packages(self) -> None:
        """Let the new environment see this one's packages (and, as Python 3.12's do, come without setuptools)."""
        (site,) = (self.root / "opt/venv/lib").glob("python3.*/site-packages")
        for part in [*site.glob("setuptools*"), site / "pkg_resources", site / "_distutils_hack"]:
            shutil.rmtree(part, ignore_errors=True)
        (site / "distutils-precedence.pth").unlink(missing_ok=True)
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    built = Image(tmp_path_factory.mktemp("image").resolve())
    built.build((ROOT / "Dockerfile").read_text())
    return built


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_every_install_step_ran(image: Image) -> None:
    assert [command.split()[0] for command in image.left_out] == ["apt-get", "useradd"]
    assert len(image.ran) == 3
    assert image.ran[0].startswith("python3 -m venv")
    assert "-r requirements.lock" in image.ran[1]
    assert image.ran[2].startswith("pip install")


@pytest.mark.slow
def test_installed_package_is_complete(image: Image) -> None:
    (installed,) = (image.root / "opt/venv/lib").glob("python3.*/site-packages/moefoundry")
    source = image.workdir / "src/moefoundry"

    def files(tree: Path) -> set[str]:
        return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.suffix in {".py", ".typed", ".yaml"}}

    assert "py.typed" in files(installed)
    assert files(installed) == files(source)


@pytest.mark.slow
def test_installed_command_runs(image: Image) -> None:
    command = [image.root / "opt/venv/bin/moefoundry", "--help"]
    result = subprocess.run(command, cwd=image.root, env=image.env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: moefoundry" in result.stdout.lower()


def test_lock_lines_are_exact_pins_without_addresses() -> None:
    assert [line for line in lock_lines() if not PIN.fullmatch(line)] == []
    names = [line.partition("==")[0] for line in lock_lines()]
    assert len(names) == len(set(names))


def test_locked_versions_are_the_installed_ones() -> None:
    wrong = {}
    for line in lock_lines():
        name, _, version = line.partition("==")
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            wrong[line] = installed
    assert wrong == {}, "run `make setup`"


def test_the_oldest_torch_is_the_one_that_is_declared() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    (oldest,) = (line.removeprefix("torch>=") for line in declared if line.startswith("torch>="))
    pins = (ROOT / "requirements-oldest.lock").read_text().splitlines()
    assert f"torch=={oldest}.0" in pins


def test_lock_covers_what_the_project_declares() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.split(r"[^a-z0-9-]", requirement)[0] for requirement in declared} - NOT_LOCKED.keys()
    assert names - {line.partition("==")[0] for line in lock_lines()} == set()
