"""Facts that a key of a recipe carries beside its type: see :func:`key`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from enum import StrEnum
from typing import Any

DURATION = r"\d{1,18}(ba|ep|tok|sp)|\d{1,18}(\.\d{1,18})?dur"  # no more digits than an int64 holds
INTERVAL = r"[1-9]\d{0,17}(ba|ep|tok|sp)"
BATCHES = r"[1-9]\d{0,17}ba"
BORDER = r"[1-9]\d{0,17}(ba|tok)"
NAME = r"(?!\.{1,2}\Z)[\w.\-]+"
SPLIT = r"[\w.\-/]*"
TARGET = r"(attention|dense|shared_experts|experts)(\.\w+)?"
ENTRY = r"[\w\-]+"
TEXT = r"(?s).+"
TAG = r"(?s).{1,64}"
LIMIT = r"[1-9]\d{0,5}[mhd]"
MOUNT = r"[^\s:\"'\\,$`]+(://[^\s:\"'\\,$`]+)?:/[^\s:\"'\\,$`]+"
OPTION = r"--[a-z][\w\-]*(=[ -~]+)?"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
WORD = r"[^\s\"'\\$`]+"
MAX_SEED = 2**32 - 1  # of NumPy's generators
MAX_BATCH = 2**20  # the loader keeps a number for each sample of a batch, also of one that is larger than the data
MAX_BLOCKS = 10_000  # far above any model; what reads a recipe lists each
MAX_EXPERTS = 100_000  # the same
MAX_FACTOR = 1e6  # of a loss or of weights; far below what overflows in a gradient
MAX_TIMEOUT = 366 * 86400  # a year; the libraries' own counters end far above
PATTERN_HINTS = {
    SPLIT: "letters, digits, '_', '-', '.' and '/'",
    ENTRY: "letters, digits, '_' and '-'",
    NAME: "letters, digits, '_', '-' and '.', but not '.' or '..'",
    TARGET: "attention, dense, shared_experts or experts, or a weight of one such as attention.q_proj",
    TEXT: "text, not empty",
    TAG: "texts of 1 to 64 characters",
    LIMIT: "a positive integer and m, h or d, such as 24h",
    MOUNT: "texts SOURCE:/PATH, without blanks, quotes, commas and $",
    OPTION: "options --NAME or --NAME=VALUE",
    VARIABLE: "names of environment variables",
    WORD: "text without blanks, quotes, backslashes and $",
    DURATION: "a duration: an integer and ba, ep, tok or sp, or a part of the run such as 0.05dur",
    INTERVAL: "a duration: a positive integer and ba, ep, tok or sp",
    BATCHES: "a positive integer and ba",
    BORDER: "a positive integer and ba or tok",
}


class Auto(StrEnum):
    """The word in place of a number that the run chooses."""

    auto = "auto"


REQUIRED: Any = ...
"""The default of a key that has none: a mapping without it is refused."""


def key(
    default: Any,
    doc: str,
    *,
    customary: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    pattern: str | None = None,
    length: int | None = None,
    available: tuple[Any, ...] | None = None,
    variants: dict[str, type] | None = None,
    tag: str = "kind",
    path: bool = False,
    free_on_resume: bool = False,
    architecture: bool = True,
    renamed_from: tuple[str, ...] = (),
    instead_of: dict[str, str] | None = None,
    other_values: dict[str, str] | None = None,
    table: str | None = None,
    first_of: str = "",
) -> Any:
    """Declare a recipe field.

    Args:
        default: The value, or a callable that makes it (a dataclass, or a lambda for lists); :data:`REQUIRED` is none.
        doc: One sentence for ``docs/recipe.md``.
        customary: Usual values of a required key, for the error where it is missing.
        ge: Lower bound.
        gt: Lower bound, itself excluded.
        le: Upper bound.
        lt: Upper bound, itself excluded.
        pattern: A regular expression that a string must match in full.
        length: How many elements a list must have.
        available: The values that this release can run; others of the type are refused as "not available yet".
        variants: For a mapping whose keys depend on one of them: the value of ``tag`` -> the dataclass.
        tag: The key that selects among ``variants``.
        path: Whether a string names a file or directory: ``~`` is expanded. It may be a URL where ``doc`` says so.
        free_on_resume: Whether a run that goes on from its own checkpoint may change it. Holds for all keys below it.
            Of data and tokenizers these keys say where they lie; what they are is compared by content.
        architecture: False for a key of ``model`` that may differ between a checkpoint and the run that starts from it.
            Holds for all keys below it.
        renamed_from: What LLM Foundry, Composer, Hugging Face or torchtitan call the same thing.
        instead_of: Names that they have for something near it -> how to say that here.
        other_values: What they call a value -> the value here.
        table: The table of parts (:mod:`moefoundry.config.parts`) from which a string is a name. A mapping with a
            ``tag`` of that table has the keys of the part that it names; with ``tag=""`` each of its keys is the name
            of a part, and a mapping of that part's keys.
        first_of: A key beside this one that maps names to mappings: where this key is absent, it is the first one's.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "doc": doc,
        "required": default is REQUIRED,
        "customary": customary,
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "pattern": pattern,
        "length": length,
        "available": available,
        "variants": variants,
        "tag": tag,
        "path": path,
        "free_on_resume": free_on_resume,
        "architecture": architecture,
        "renamed_from": renamed_from,
        "instead_of": instead_of or {},
        "other_values": other_values or {},
        "table": table,
        "first_of": first_of,
    }
    if isinstance(default, Callable):  # type: ignore[arg-type]
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
