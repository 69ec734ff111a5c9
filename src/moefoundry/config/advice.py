"""Warnings about valid recipes that are seldom meant; :mod:`moefoundry.config.checks` has the errors."""

from __future__ import annotations

from moefoundry.config.errors import Problem
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_model import Assignment


def advice(recipe: Recipe) -> list[Problem]:
    """List warnings, each with its cure as the suggestion. Training goes on in spite of them."""
    moe = recipe.model.moe
    router = moe.router
    gate_chooses = moe.num_experts > 1 and router.assignment == Assignment.scores
    if not (moe.top_k == 1 and router.normalize_topk and gate_chooses):
        return []
    message = "true, and with model.moe.top_k=1 every weight is 1: the gate learns nothing from the model's loss"
    return [Problem("model.moe.router.normalize_topk", message, suggestion="model.moe.router.normalize_topk=false")]
