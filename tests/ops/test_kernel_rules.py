"""Rules of the kernels' text, for faults of compilers that no test without a GPU would show."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

OPS = Path(__file__).parents[2] / "src/moefoundry/ops"


def sums_of_several_products(source: str) -> Iterator[str]:
    """Yield ``line: name`` for each sum to which a step of a loop adds more than one product.

    Compiled wrongly for compute capability 10.0 (triton issue 10821); on 9.0 each product waits for the one before.
    """
    for loop in ast.walk(ast.parse(source)):
        if not isinstance(loop, ast.For | ast.While):
            continue
        added: Counter[str] = Counter()
        for node in (node for statement in loop.body for node in ast.walk(statement)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                sums = [*node.args[2:3], *(word.value for word in node.keywords if word.arg == "acc")]
                added.update(ast.unparse(total) for total in sums)
            elif isinstance(node, ast.AugAssign) and "tl.dot(" in ast.unparse(node.value):
                added[ast.unparse(node.target)] += 1
        yield from (f"{loop.lineno}: {name}" for name, times in added.items() if times > 1)


def test_the_rule_finds_what_it_is_for() -> None:
    once = "for k in range(n):\n    total = tl.dot(a, b, total)\n    other = tl.dot(c, d, other)\n"
    twice = "for k in range(n):\n    total = tl.dot(a, b, total)\n    if k:\n        total = tl.dot(c, d, acc=total)\n"
    added = "while k < n:\n    total += tl.dot(a, b)\n    total = tl.dot(c, d, total)\n"
    assert [*sums_of_several_products(once)] == []
    assert [*sums_of_several_products(twice)] == ["1: total"]
    assert [*sums_of_several_products(added)] == ["1: total"]


def test_a_step_adds_one_product_to_a_sum() -> None:
    found = [
        f"{path.relative_to(OPS)}:{place}"
        for path in sorted(OPS.rglob("*.py"))
        for place in sums_of_several_products(path.read_text())
    ]
    assert found == []
