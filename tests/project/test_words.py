"""Docstrings begin with a verb or a noun phrase. ruff's pydocstyle rules hold the rest of their form."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/moefoundry"
OPENINGS = {"Of", "What", "Whether", "How", "Which", "When", "Where", "Who", "That"}


def first_words(path: Path) -> list[tuple[int, str]]:
    """Line and first word of each docstring of a file, those behind attributes and constants among them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    texts = [node for node in statements if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, node.value.split(maxsplit=1)[0]) for node in texts]


def test_no_docstring_opens_as_a_subordinate_clause() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {word}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, word in first_words(path)
        if word in OPENINGS
    ]
    assert found == []
