"""Callbacks of Composer that end training by a metric: less of an entropy is better, and the run says that it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import load_recipe
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed
from tests.train.runs import run_recipe

STOPPER = "callbacks={{threshold_stopper: {{monitor: LanguageCrossEntropy, dataloader_label: eval, threshold: {}}}}}"


@pytest.mark.parametrize(("threshold", "batches"), [(100.0, 2), (0.1, 4)])
def test_a_run_that_ends_early_says_so(
    tiny_overrides: Callable[..., list[str]], tmp_path: Path, threshold: float, batches: int
) -> None:
    overrides = tiny_overrides(tmp_path / "run", "eval_interval=2ba", STOPPER.format(threshold))
    run = run_recipe(load_recipe(QUICKSTART, overrides))
    assert [line["batch"] for line in run.metrics] == [*range(1, batches + 1)]
    events = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert (events[-1]["state"], events[-1]["batch"]) == ("finished", batches)
    early = "a callback ended training after batch 2, before max_duration, 4ba"
    assert events[-1]["reason"] == (early if batches == 2 else "")
    assert (f"note: {early}\n" in run.err) == (batches == 2)


def comparisons() -> dict[str, str]:
    from moefoundry.config.parts import TABLES

    found = {}
    for monitor in ("LanguageCrossEntropy", "LanguagePerplexity", "Accuracy", "LanguageCrossEntropy greater"):
        name, _, comp = monitor.partition(" ")
        keys = {"monitor": name, "dataloader_label": "eval", **({"comp": comp} if comp else {})}
        key = f"callbacks.early_stopper={json.dumps(keys)}"
        part = TABLES["callbacks"].find("early_stopper")
        assert part is not None
        found[monitor] = part.make(load_recipe(QUICKSTART, [key]).callbacks.early_stopper).comp_func.__name__
    return found


def test_less_is_better_of_an_entropy() -> None:
    assert run_distributed(comparisons, 1)[0] == {
        "LanguageCrossEntropy": "less",
        "LanguagePerplexity": "less",
        "Accuracy": "greater",
        "LanguageCrossEntropy greater": "greater",
    }
