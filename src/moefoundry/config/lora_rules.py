"""Rules between the keys of ``lora`` and the rest of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from moefoundry.config.errors import Problem
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_lora import LoraConfig
from moefoundry.config.schema_parts import Compute
from moefoundry.config.urls import url_problem

BY_ROWS = ("auto", "grouped_mm", "loop")
"""Mixture backends beside whose products an adapter's can be computed; the others compute an expert in one piece."""


def lora_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with a recipe's adapters."""
    lora, backend = recipe.lora, recipe.model.moe.backend
    if lora is None:
        return
    if not lora.targets:
        yield Problem(
            "lora.targets", "an empty list adapts nothing", allowed="attention, dense, shared_experts, experts"
        )
    if lora.base is None and recipe.load_path is None:
        message = "adapters are trained on top of trained weights, and neither load_path nor lora.base names any"
        yield Problem("lora.base", message, allowed="a checkpoint", suggestion="load_path=CHECKPOINT")
    if lora.base is not None and (problem := url_problem(lora.base)):
        yield Problem("lora.base", f"{lora.base}: {problem}")
    if not any(target.split(".")[0] == "experts" for target in lora.targets):
        return
    if backend not in BY_ROWS:
        message = f"{backend} computes an expert in one piece, and has no place for adapters of experts"
        yield Problem("model.moe.backend", message, ", ".join(BY_ROWS), suggestion="model.moe.backend=auto")
    multiple = 8 if recipe.precision.compute == Compute.bf16 else 4
    if backend in BY_ROWS[:2] and lora.rank % multiple:
        message = f"the grouped_mm backend needs rows of whole 16 bytes, but {lora.rank} is not divisible by {multiple}"
        allowed = f"multiples of {multiple} with precision.compute={recipe.precision.compute}"
        yield Problem("lora.rank", message, allowed, suggestion="model.moe.backend=loop")


def target_problems(cfg: LoraConfig, known: set[str]) -> list[Problem]:
    """List what is wrong with the targets of adapters, of a model that has the groups and weights ``known``."""
    problems = []
    for index, target in enumerate(cfg.targets):
        if "." in target and target not in known:
            near = "".join(difflib.get_close_matches(target, known, 1))
            problems.append(Problem(f"lora.targets[{index}]", f"the model has no {target}", suggestion=near))
    if not problems and not known & set(cfg.targets):
        message = f"the model has none of {', '.join(cfg.targets)}"
        problems.append(Problem("lora.targets", message, allowed=", ".join(sorted(known))))
    return problems
