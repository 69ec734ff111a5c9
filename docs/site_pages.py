"""Pages of the site that lie outside ``docs/``; a hook of mkdocs, which ``mkdocs.yml`` names.

Links between the pages are relative paths in the repository. In the site, README.md is the front page, and each file
outside that a page links to becomes a page as well: Markdown as it is, everything else in a code block.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?![\w+]+:)[^)#\s]+")
"""The path of a link that is neither a URL nor a place on the same page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page and the files outside ``docs/`` that are linked to, also from each other."""
    pending = [ROOT / "README.md", *DOCS.glob("*.md")]
    seen = set(pending)
    while pending:
        path = pending.pop()
        address = place(path)
        if files.get_file_from_path(address) is None:
            files.append(File.generated(config, address, content=as_markdown(path)))
        linked = {target(path, link) for link in LINK.findall(path.read_text())} if path.suffix == ".md" else set()
        new = {path for path in linked if path.exists() and path.suffix != ".png"} - seen
        seen |= new
        pending += new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a page's links lead to pages of the site."""
    address = page.file.src_uri
    path = ROOT / ("README.md" if address == "index.md" else source(address))

    def rewritten(link: re.Match[str]) -> str:
        linked = target(path, link[0])
        return os.path.relpath(place(linked), Path(address).parent) if linked.exists() else link[0]

    return LINK.sub(rewritten, markdown) if path.suffix == ".md" else markdown


def target(page: Path, link: str) -> Path:
    """The file or directory that a page's link leads to."""
    return Path(os.path.normpath(page.parent / link))


def place(path: Path) -> str:
    """Path of a file's page below the site's root; pictures of ``docs/`` stay files."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.parent == DOCS and path.suffix in {".md", ".png"}:
        return path.name
    return f"repository/{path.relative_to(ROOT)}{'' if path.suffix == '.md' else '.md'}"


def source(address: str) -> str:
    """Path in the repository of the file that a page was made from; the inverse of :func:`place`."""
    if not address.startswith("repository/"):
        return f"docs/{address}"
    path = address.removeprefix("repository/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def as_markdown(path: Path) -> str:
    """Text of a file or of a directory's files: Markdown, or a title and code blocks."""
    if path.suffix == ".md":
        return path.read_text()
    if path.is_dir():
        parts = [file for file in sorted(path.rglob("*")) if file.suffix in {".py", ".toml", ".yaml"}]
    else:
        parts = [path]
    blocks = [f"## {part.name}\n\n````{part.suffix[1:]}\n{part.read_text()}````\n" for part in parts]
    return "\n".join([f"# {path.relative_to(ROOT)}\n", *blocks])
