"""Every page of ``docs/`` is in the site once, and the site is built without a warning and without a dead link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import moefoundry
from moefoundry.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
INSTALLED = ROOT / ".mkdocs"  # by `make mkdocs`, which `make test` begins with
FRONT = "index.md"
"""The front page, which is README.md."""
GENERATED = ["api.md", "commands.md"]
"""Pages that docs/reference_pages.py makes of the code."""


def pages(nav: object) -> Iterator[str]:
    """Files that a navigation of mkdocs names, in their order."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for part in nav.values():
            yield from pages(part)
    else:
        assert isinstance(nav, list), nav
        for part in nav:
            yield from pages(part)


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert listed[:2] == [FRONT, "tutorial.md"]
    assert sorted(listed) == sorted([FRONT, *GENERATED, *(page.name for page in (ROOT / "docs").glob("*.md"))])


def test_lock_adds_exact_versions_to_the_environments() -> None:
    first, own = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
        for name in ("requirements.lock", "requirements-docs.lock")
    )
    assert {"mkdocs", "mkdocs-material"} <= own.keys()
    assert not first.keys() & own.keys()


class Links(HTMLParser):
    """Addresses that a page refers to, and the places that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.targets |= {value for name in ("href", "src") if (value := named.get(name))}
        self.places |= {value for name in ("id", "name") if (value := named.get(name))}


def dead_links(site: Path) -> list[str]:
    """Links within the site that lead to no file or to no place of a page."""
    read = {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    dead = []
    for page, links in read.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = Path(os.path.normpath(page.parent / unquote(url.path))) if url.path else page
            path = path / "index.html" if path.is_dir() else path
            known = url.fragment in {"", *read[path].places} if path in read else path.exists() and not url.fragment
            if not known:
                dead.append(f"{page.relative_to(site)}: {target}")
    return dead


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    """Links between pages, and to files outside ``docs/``, lead somewhere; nothing is loaded from another server."""
    if not (INSTALLED / "mkdocs").exists() and find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: `make mkdocs` has not been run")
    site = tmp_path / "site"
    env = {**os.environ, "PYTHONPATH": f"{INSTALLED}:{os.environ.get('PYTHONPATH', '')}", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert dead_links(site) == []
    front = (site / "index.html").read_text()
    assert 'data-md-color-scheme="slate"' in front
    assert not re.findall(r"<(?:script|img|link rel=\"(?:stylesheet|preconnect)\")[^>]*(?:src|href)=\"https?:", front)
    recipe = (site / "repository/configs/pretrain/olmoe-1b-7b.yaml/index.html").read_text()
    assert "olmoe-1b-7b" in recipe
    api, commands = ((site / name / "index.html").read_text() for name in ("api", "commands"))
    for name in (*moefoundry._MODULES, "LoadedCheckpoint", "UserError"):
        assert f'.{name}"' in api, f"{name} has an anchor"
    assert ":class:" not in api
    for name in (*COMMANDS, "convert export", "checkpoint delete"):
        assert f"Usage: moefoundry {name} " in commands, name
    assert "token" in (site / "search/search_index.json").read_text()
    assert not [path for path in site.rglob("*.py") if path.is_file()]
