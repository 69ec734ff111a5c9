"""Rules for training on preferences."""

from __future__ import annotations

from collections.abc import Iterator

from moefoundry.config.errors import Problem
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_data import PackingMethod


def preference_problems(recipe: Recipe) -> Iterator[Problem]:
    """List what dpo cannot go with: its pairs are two documents of a row, and it predicts one token ahead."""
    if recipe.dpo is None:
        return
    if not recipe.model.document_masking:
        yield Problem("model.document_masking", "false, and dpo compares two documents of a row", allowed="true")
    if depth := recipe.model.mtp.depth:
        yield Problem("model.mtp.depth", f"{depth}, and dpo trains no further predictions", allowed="0")
    for name, loader in (("train_loader", recipe.train_loader), ("eval_loader", recipe.eval_loader)):
        if loader is not None and loader.dataset.packing.method != PackingMethod.pairs:
            message = f"{loader.dataset.packing.method}, and dpo reads pairs"
            yield Problem(f"{name}.dataset.packing.method", message, allowed="pairs")
