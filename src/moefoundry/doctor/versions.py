"""Checks of installed packages: what the package needs is there, in the tested versions where these are known."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from moefoundry.config.errors import first_few
from moefoundry.doctor.finding import Finding, Status, graded
from moefoundry.version import __version__

LOCK = Path(__file__).parents[3] / "requirements.lock"  # in a clone; a wheel has none
SHOWN = ("torch", "triton", "mosaicml", "mosaicml-streaming", "llm-foundry", "transformers", "numpy")


def version_checks(lock: Path = LOCK, installed: Callable[[str], str | None] | None = None) -> Iterator[Finding]:
    """Check Python and packages.

    Args:
        lock: File of lines ``name==version``.
        installed: Gives the version of a package that is installed, or None; the environment's by default.
    """
    of = installed or installed_version
    python = f"moefoundry {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield graded("software", python, (sys.version_info < (3, 11), Status.error, "Python 3.11 or later is needed"))
    shown = ", ".join(f"{name} {found}" for name in SHOWN if (found := of(name)))
    if missing := [name for name in needed() if of(name) is None]:
        text = f"{first_few(missing)} {'are' if missing[1:] else 'is'} not installed"
        yield Finding("packages", Status.error, text, "make setup, or pip install --no-deps -r requirements.lock")
    else:
        yield Finding("packages", Status.ok, shown)
    if not lock.is_file():
        yield Finding("tested versions", Status.ok, "no requirements.lock beside the package to compare with")
        return
    other = [
        f"{name} {found} for {wanted}"
        for name, wanted in locked(lock).items()
        if (found := of(name)) is not None and found.partition("+")[0] != wanted
    ]
    text = first_few(other) if other else f"as in {lock.name}"
    remedy = f"these versions were not tested together; make setup installs those of {lock.name}"
    yield graded("tested versions", text, (bool(other), Status.warning, remedy))


def installed_version(name: str) -> str | None:
    """Find the version of an installed package; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def needed() -> list[str]:
    """List the packages that this one cannot do without, by their names."""
    try:
        found = requires("moefoundry") or []
    except PackageNotFoundError:  # it runs from its sources
        return ["torch", "mosaicml", "mosaicml-streaming", "omegaconf"]
    return [re.split(r"[<>=!~; \[]", text)[0] for text in found if "extra ==" not in text]


def locked(lock: Path) -> dict[str, str]:
    """Read the versions of a lock file by names of packages."""
    pairs = (line.partition("==") for line in lock.read_text().splitlines() if "==" in line)
    return {name.strip(): wanted.strip() for name, _, wanted in pairs}
