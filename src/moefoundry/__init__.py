"""Train Mixture-of-Experts language models from YAML recipes. ``docs/python.md`` shows what is exported here.

A name is imported when it is first used: torch and Composer take many seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moefoundry.version import __version__

if TYPE_CHECKING:
    from moefoundry.config import Recipe, load_recipe
    from moefoundry.data.options import PrepareOptions
    from moefoundry.data.prepare import prepare
    from moefoundry.pretrained import from_pretrained, load_checkpoint
    from moefoundry.trainer import train

__all__ = [
    "PrepareOptions",
    "Recipe",
    "__version__",
    "from_pretrained",
    "load_checkpoint",
    "load_recipe",
    "prepare",
    "train",
]

_MODULES = {
    "PrepareOptions": "moefoundry.data.options",
    "Recipe": "moefoundry.config",
    "from_pretrained": "moefoundry.pretrained",
    "load_checkpoint": "moefoundry.pretrained",
    "load_recipe": "moefoundry.config",
    "prepare": "moefoundry.data.prepare",
    "train": "moefoundry.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(_MODULES[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
