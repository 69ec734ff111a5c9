"""A rank that stands still: each rank writes where it is, and one line says which ranks wait in what."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.callbacks.hangs import Place, describe, numbers, place_of
from moefoundry.config import Recipe
from tests.distributed import captured_output, run_distributed
from tests.train.runs import finished

Tiny = Callable[..., Recipe]
STEPS = ("max_duration=4ba", "eval_loader=null", "mesh={replicate: 1, shard: 2, expert: 2}")


def sleep_in_the_third_batch(seconds: float) -> None:
    from composer.core import Callback

    from tests.train.test_health import add_callback, in_the_third_batch_of_the_last_rank

    class Sleep(Callback):
        slept = False

        def after_forward(self, state: Any, logger: Any) -> None:
            if in_the_third_batch_of_the_last_rank(state) and not self.slept:  # of its first micro-batch
                self.slept = True
                time.sleep(seconds)

    add_callback(Sleep())


def outcome(recipe: Recipe, seconds: float) -> tuple[str, str]:
    from moefoundry.callbacks.health import CollectiveError
    from moefoundry.trainer import train

    sleep_in_the_third_batch(seconds)
    error = ""
    with captured_output() as texts:
        try:
            train(recipe)
        except CollectiveError as caught:
            error = str(caught)
    return texts[1], error


@pytest.mark.parametrize(
    "ends",
    [pytest.param(True, id="until-the-time-out"), pytest.param(False, id="and-goes-on", marks=pytest.mark.slow)],
)
def test_every_rank_says_where_it_is(tiny_recipe: Tiny, tmp_path: Path, ends: bool) -> None:
    recipe = tiny_recipe(tmp_path, *STEPS, f"dist_timeout={3 if ends else 6}")
    outcomes = run_distributed(outcome, 2, recipe, 5.0)
    warnings = [line for text, _ in outcomes for line in text.splitlines() if "no progress" in line]
    said = [line for line in warnings if "in after_forward" in line]  # a busy machine stands still elsewhere, too
    assert len(said) == 1, "one rank speaks"
    place = r"rank 1 is at \S+\.py:\d+, in \w+ \(\S*test_hangs\.py:\d+, in after_forward\)"
    wait = r"rank 0 waits in gloo:\w+\(.*\), number \d+ of group \w+, at \S+\.py:\d+, in \w+"
    patience = "1.5" if ends else "3"
    assert re.fullmatch(rf"warning: no progress for {patience} s: {place}; {wait}; stacks: {tmp_path}/hang", said[0])
    if not ends:
        assert [error for _, error in outcomes] == ["", ""]
        assert len(finished(tmp_path).metrics) == 4
        return
    assert all("failed: another rank did not join it" in error for _, error in outcomes)
    reports = [(tmp_path / f"hang/rank{rank}.txt").read_text() for rank in range(2)]
    assert all("MainThread:\n" in report and "last collective: gloo:" in report for report in reports)
    assert "in after_forward\n    time.sleep(seconds)" in reports[1]
    assert "in after_forward" not in reports[0]


@pytest.mark.parametrize(("state", "waits"), [("started", True), ("completed", False)])
def test_with_nccl_the_flight_recorder_says_if_a_rank_waits(
    monkeypatch: pytest.MonkeyPatch, state: str, waits: bool
) -> None:
    """The host waits for a result, outside of torch.distributed."""
    import torch

    entry = {"profiling_name": "nccl:all_to_all", "input_dtypes": ["Float"], "input_sizes": [[8, 4]], "state": state}
    trace = json.dumps({"entries": [{**entry, "collective_seq_id": 7, "process_group": ["1", "expert"]}]})
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_fr_trace_json", lambda *_: trace, raising=False)
    place = place_of(3, sys._getframe())
    assert place.collective == ("nccl:all_to_all(Float[8, 4]), number 7 of group expert" if waits else "")
    assert re.search(r"test_hangs\.py:\d+, in test_with_nccl", place.at)


def test_ranks_at_one_place_are_named_together_with_the_late_ones_first() -> None:
    waiting = [Place(rank, "nccl:all_to_all", "ops/all_to_all.py:61, in wait_for") for rank in (0, 1, 2, 5)]
    text = describe([*waiting, Place(3, "", "data/loader.py:9, in next")], 8)
    assert text == (
        "rank 3 is at data/loader.py:9, in next; ranks 0-2, 5 wait in nccl:all_to_all, at "
        "ops/all_to_all.py:61, in wait_for; ranks 4, 6-7 did not answer"
    )
    assert numbers([7]) == "rank 7"
