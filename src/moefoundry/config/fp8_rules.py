"""Rules of ``precision.fp8`` that need the names of the model's modules."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase

from moefoundry.config.errors import Problem
from moefoundry.config.schema_parts import Fp8Config


def exclude_problems(exclude: Collection[str], modules: Collection[str]) -> list[Problem]:
    """List the patterns of ``precision.fp8.exclude`` that match none of the modules' names; the defaults may."""
    problems = []
    for pattern in exclude:
        if pattern not in Fp8Config().exclude and not any(fnmatchcase(name, pattern) for name in modules):
            near = "".join(difflib.get_close_matches(pattern, modules, 1))
            problems.append(Problem("precision.fp8.exclude", f"no module is named {pattern!r}", suggestion=near))
    return problems
