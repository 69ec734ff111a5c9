"""A run notes its starts and ends in ``history.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moefoundry.config import Recipe
from moefoundry.runs.facts import RunState, read_facts
from moefoundry.runs.history import read_history
from tests.distributed import run_distributed


def break_at_batch_3() -> None:
    from moefoundry.callbacks.health import GradientNorm

    measure = GradientNorm.after_train_batch

    def fail(self: Any, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == 2:
            raise ValueError("broken, hf_" + "abcdefghijKLMNOPQRST1234567890abcd")
        measure(self, state, logger)

    GradientNorm.after_train_batch = fail  # type: ignore[method-assign]


def train(recipe: Recipe, fails: bool) -> None:
    from moefoundry.trainer import train as train_recipe

    if fails:
        break_at_batch_3()
    try:
        train_recipe(recipe, ["python", "train.py", "seed=1"], {"seed": "override", "run_dir": "default"})
    except ValueError:
        assert fails


def test_a_run_notes_its_starts_and_ends(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    changes = ("save_interval=2ba", "autoresume=true")
    run_distributed(train, 2, tiny_recipe(tmp_path, *changes), True)
    facts = read_facts(tmp_path)
    assert facts.state is RunState.failed
    assert facts.reason == "ValueError: broken, (secret)"
    run_distributed(train, 1, tiny_recipe(tmp_path, *changes), False)
    start, end, again, last = read_history(tmp_path)
    assert (start["batch"], start["from"], start["world_size"]) == (0, "", 2)
    assert start["mesh"] == {"replicate": 1, "shard": 2, "expert": 1}
    assert start["versions"].keys() >= {"moefoundry", "torch", "composer", "python"}
    assert start["origins"] == {"seed": "override"}
    assert start["command"] == "python train.py seed=1"
    assert (end["state"], end["batch"]) == ("failed", 2)
    assert (again["batch"], again["from"]) == (2, str(tmp_path / "checkpoints/ba2"))
    assert (last["event"], last["batch"], last["state"]) == ("end", 4, "finished")
    facts = read_facts(tmp_path)
    assert (facts.state, facts.batch, facts.checkpoints, facts.problems) == (RunState.finished, 4, [2, 4], [])
    assert facts.seconds is not None
    assert 0 <= facts.seconds < time.time() - 1.5e9
