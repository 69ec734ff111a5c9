"""Record which functions of moefoundry run, in the order of their first entry.

with trace() as calls:
    train(recipe)
assert calls[0] == "moefoundry.trainer:train"
print(len(calls), "functions in", len(calls.modules), "files")
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import moefoundry

ROOT = Path(moefoundry.__file__).parent


class Calls(list[str]):
    """Names such as ``moefoundry.moe.layer:MoELayer.forward``, one for each function, by first entry.

    Functions without a name of their own (lambdas, comprehensions, bodies of modules and classes) are left out.
    """

    @property
    def modules(self) -> list[str]:
        """Modules of these functions, by first entry; each is one file."""
        return list(dict.fromkeys(name.partition(":")[0] for name in self))

    def has_in_order(self, *names: str) -> bool:
        """Say whether all of ``names`` are entered, in this order."""
        rest = iter(self)
        return all(name in rest for name in names)


@contextmanager
def trace() -> Iterator[Calls]:
    """Record calls of this thread, and of threads that start inside the block."""
    calls = Calls()
    seen: set[CodeType] = set()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in seen:
            seen.add(code)
            name = _name(code)
            if name is not None and name not in calls:
                calls.append(name)

    before = sys.getprofile()
    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        yield calls
    finally:
        sys.setprofile(before)
        threading.setprofile(before)


def _name(code: CodeType) -> str | None:
    """``module:qualified.name``; None for functions of other packages and for those without a name."""
    path = Path(code.co_filename)
    if code.co_name.startswith("<") or not path.is_relative_to(ROOT):
        return None
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    return f"{module}:{code.co_qualname.replace('.<locals>', '')}"
