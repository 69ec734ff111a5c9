"""Averages of tasks by LLM Foundry's rules: its ``EvalGauntlet``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from statistics import fmean

from moefoundry.config.schema_tasks import BenchmarkConfig, TaskConfig, Weighting
from moefoundry.config.tasks import Gauntlet

PREFIX = "icl/metrics/eval_gauntlet/"
ACCURACY = "Accuracy"


def gauntlet_scores(gauntlet: Gauntlet, metrics: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Average accuracies over categories, and categories over averages.

    A category of which a task was not evaluated is left out; an average without any category is 0.

    Args:
        gauntlet: Categories, averages and rules.
        metrics: ``metrics/LABEL/N-shot/METRIC``, or with a category of the task before the metric.
        sizes: Examples by ``LABEL/N-shot``, or with the category.

    Returns:
        Scores by name, with the prefix that LLM Foundry logs.
    """
    accuracies: dict[str, list[float]] = {}
    for name, value in metrics.items():
        _, label, shots, *rest = name.split("/")
        if ACCURACY in rest[-1]:
            accuracies.setdefault(f"{label}/{shots}", []).append(value)
    scores: dict[str, float] = {}
    for category in gauntlet.categories:
        names = [f"{each.name}/{each.num_fewshot}-shot" for each in category.benchmarks]
        if names and all(name in accuracies for name in names):
            weights = [_weight(gauntlet.cfg.weighting, name, sizes) for name in names]
            values = [
                _score(gauntlet, each, fmean(accuracies[name]))
                for each, name in zip(category.benchmarks, names, strict=True)
            ]
            scores[category.name] = sum(
                value * (weight / sum(weights)) for value, weight in zip(values, weights, strict=True)
            )
    for name, members in gauntlet.averages.items():
        known = [scores[member] for member in members if member in scores]
        scores[name] = fmean(known) if known else 0.0
    return {f"{PREFIX}{name}": score for name, score in scores.items()}


def left_out(gauntlet: Gauntlet, tasks: Sequence[TaskConfig]) -> list[str]:
    """Say which categories are left out, as a task of theirs is not evaluated."""
    evaluated = {f"{task.label}/{shots}-shot" for task in tasks for shots in task.num_fewshot}
    texts = []
    for category in gauntlet.categories:
        names = [f"{each.name}/{each.num_fewshot}-shot" for each in category.benchmarks]
        if missing := [name for name in names if name not in evaluated]:
            texts.append(f"eval_gauntlet: {category.name} is left out: icl_tasks have no {', '.join(missing)}")
    return texts


def _score(gauntlet: Gauntlet, benchmark: BenchmarkConfig, accuracy: float) -> float:
    if not gauntlet.cfg.subtract_random_baseline:
        return accuracy
    above = accuracy - benchmark.random_baseline
    return above / (1 - benchmark.random_baseline) if gauntlet.cfg.rescale_accuracy else above


def _weight(weighting: Weighting, name: str, sizes: Mapping[str, int]) -> float:
    """Weigh a benchmark by its examples, those of all of its categories."""
    if weighting == Weighting.equal:
        return 1
    count = sum(size for label, size in sizes.items() if f"{label}/".startswith(f"{name}/"))
    return count if weighting == Weighting.sample_size else max(log2(count), 1)
