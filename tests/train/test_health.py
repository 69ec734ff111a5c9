"""Numbers that are not finite, and ranks that do not answer: what is named, what stays as it was, how the run ends.

A 2-rank run gets its fault in one rank, at the third batch.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moefoundry.callbacks.health import CollectiveError, NonFiniteError, named_collectives
from moefoundry.config import Recipe
from moefoundry.sweeping.run import not_finite
from tests.distributed import captured_output, run_distributed
from tests.train.runs import Run, finished, run_recipe

Tiny = Callable[..., Recipe]
STEPS = ("max_duration=6ba", "save_interval=2ba", "eval_loader=null", "model.moe.balance.bias_update_rate=0.01")
WEIGHT = "model.layers.2.ffn.experts.up_proj"


def add_callback(callback: Any, *, first: bool = False) -> None:
    from moefoundry import build as parts

    build_callbacks = parts.build_callbacks

    def with_another(*args: Any) -> list[Any]:
        callbacks = build_callbacks(*args)
        return [callback, *callbacks] if first else [*callbacks, callback]

    parts.build_callbacks = with_another


def in_the_third_batch_of_the_last_rank(state: Any) -> bool:
    from composer.utils import dist

    return state.timestamp.batch.value == 2 and dist.get_global_rank() == dist.get_world_size() - 1


def infinite_loss() -> None:
    """The loss is infinite while every gradient is finite: an infinite constant is added to it."""
    change_loss(lambda losses: {"total": losses["total"] + torch.inf, "z": losses["z"] + torch.inf})


def nan_loss() -> None:
    """The loss is NaN, and with it every gradient of every rank."""
    change_loss(lambda losses: {"total": losses["total"] * torch.nan, "lm": losses["lm"] * torch.nan})


def change_loss(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """In the third batch, on the last rank."""
    from composer.core import Callback

    from moefoundry.foundry import ComposerMoECausalLM

    class Fault(Callback):
        def before_loss(self, state: Any, logger: Any) -> None:
            ComposerMoECausalLM.loss = changed if in_the_third_batch_of_the_last_rank(state) else loss

    def changed(self: ComposerMoECausalLM, outputs: Any, batch: Any) -> dict[str, Tensor]:
        losses = loss(self, outputs, batch)
        return losses | change(losses)

    loss = ComposerMoECausalLM.loss
    add_callback(Fault())


def infinite_gradient() -> None:
    """One element of one gradient is infinite, in one rank's shard."""
    from composer.core import Callback

    class Fault(Callback):
        def after_train_batch(self, state: Any, logger: Any) -> None:
            if in_the_third_batch_of_the_last_rank(state):
                gradient = dict(state.model.named_parameters())[WEIGHT].grad
                getattr(gradient, "to_local", lambda: gradient)().view(-1)[0] = -torch.inf

    add_callback(Fault(), first=True)


def watched(recipe: Recipe, fault: Callable[[], None]) -> dict[str, Any]:
    """Train with a fault; the error, and whether the third step changed weights, optimizer, expert bias or average."""
    from composer.core import Callback

    from moefoundry.callbacks.ema import Ema
    from moefoundry.checkpoint.state import optimizer_tensors, trained_tensors
    from moefoundry.trainer import train

    class Watch(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            self.state = state
            if state.timestamp.batch.value == 2:
                self.before = self.tensors()

        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch.value == 3:
                self.after = self.tensors()

        def tensors(self) -> dict[str, Tensor]:
            state = self.state
            tensors = {**trained_tensors(state.model), **optimizer_tensors(state.model, state.optimizers[0])}
            for average in (callback for callback in state.callbacks if isinstance(callback, Ema)):
                tensors |= average.tensors()
            return {name: copy.deepcopy(tensor) for name, tensor in tensors.items()}

    watch, error = Watch(), None
    fault()
    add_callback(watch)
    with captured_output() as texts:
        try:
            train(recipe)
        except NonFiniteError as caught:
            error = str(caught)
            watch.after = watch.tensors()

    def local(tensor: Tensor) -> Tensor:
        return getattr(tensor, "to_local", lambda: tensor)()

    changed = [name for name, old in watch.before.items() if not torch.equal(local(old), local(watch.after[name]))]
    return {"error": error, "changed": changed, "err": texts[1], "tensors": len(watch.before)}


@pytest.mark.parametrize(
    ("fault", "named", "unnamed"),
    [
        pytest.param(
            infinite_loss, "batch 3: not finite: loss total, z of rank 1. ", "gradients", marks=pytest.mark.slow
        ),
        (nan_loss, "batch 3: not finite: gradients of model.lm_head.weight, model.norm.weight, ", "no gradient"),
        pytest.param(
            infinite_gradient,
            f"batch 3: not finite: gradients of {WEIGHT} on rank 1. ",
            "loss",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_row18_all_ranks_stop_before_the_update(
    tiny_recipe: Tiny, tmp_path: Path, fault: Callable[[], None], named: str, unnamed: str
) -> None:
    outcomes = run_distributed(watched, 2, tiny_recipe(tmp_path, *STEPS), fault)
    for outcome in outcomes:
        assert outcome["error"].startswith(named), outcome["error"]
        assert unnamed not in outcome["error"]
        assert outcome["tensors"] > 50
        assert outcome["changed"] == []
    if fault is nan_loss:
        assert "; loss total, lm of rank 1; " in outcomes[0]["error"]
        assert "more on rank 0" in outcomes[0]["error"]
    run = finished(tmp_path)
    assert list(run.column("batch")) == [1, 2]
    assert run.checkpoints() == ["ba2"]


@pytest.fixture(scope="module")
def whole(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run without a fault."""
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("whole"), *STEPS), 2)


@pytest.mark.parametrize("fault", [nan_loss, pytest.param(infinite_gradient, marks=pytest.mark.slow)])
def test_row18_a_skipped_step_changes_nothing_and_the_run_goes_on(
    tiny_recipe: Tiny, tmp_path: Path, whole: Run, fault: Callable[[], None]
) -> None:
    recipe = tiny_recipe(tmp_path, *STEPS, "nonfinite=skip", "ema.decay=0.5")
    outcomes = run_distributed(watched, 2, recipe, fault)
    for outcome in outcomes:
        assert outcome["error"] is None
        assert outcome["changed"] == []
    assert "batch 3: not finite: " in outcomes[0]["err"]
    assert "The step is skipped" in outcomes[0]["err"]
    assert "not finite" not in outcomes[1]["err"]
    run = finished(tmp_path)
    assert run.column("skipped_steps") == {3: 1}
    assert run.column("lr") == whole.column("lr"), "the schedule goes on"
    assert {b: v for b, v in run.exact().items() if b < 3} == {b: v for b, v in whole.exact().items() if b < 3}
    totals = run.column("loss/train/total")
    assert totals[4] != whole.column("loss/train/total")[4], "a step is missing"
    assert totals[6] < totals[1]


def nan_in_every_batch() -> None:
    from moefoundry.callbacks import health
    from moefoundry.foundry import ComposerMoECausalLM

    health.MAX_SKIPPED_IN_A_ROW = 2
    loss = ComposerMoECausalLM.loss
    ComposerMoECausalLM.loss = lambda *args: {name: value * torch.nan for name, value in loss(*args).items()}


def test_row18_skipping_comes_to_an_end(tiny_recipe: Tiny, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"^batch 3: not finite: loss total, .* 2 steps before it were skipped\n"):
        run_recipe(tiny_recipe(tmp_path, *STEPS, "nonfinite=skip"), 1, nan_in_every_batch)
    assert finished(tmp_path).column("skipped_steps") == {1: 1, 2: 1}
    assert not_finite(tmp_path) == 3, "as a sweep reads it"


def without_the_check() -> None:
    from moefoundry.callbacks.health import FiniteCheck

    FiniteCheck.after_loss = FiniteCheck.after_train_batch = lambda self, state, logger: None  # type: ignore


def test_row18_the_check_changes_no_bit(tiny_recipe: Tiny, tmp_path: Path, whole: Run) -> None:
    assert run_recipe(tiny_recipe(tmp_path, *STEPS), 2, without_the_check).exact() == whole.exact()


def late_in_the_third_batch() -> None:
    from composer.core import Callback

    class Sleep(Callback):
        def after_forward(self, state: Any, logger: Any) -> None:
            if in_the_third_batch_of_the_last_rank(state):
                time.sleep(4)

    add_callback(Sleep())


def error_of(recipe: Recipe) -> str:
    from moefoundry.trainer import train

    late_in_the_third_batch()
    with pytest.raises(CollectiveError) as caught:
        train(recipe)
    return str(caught.value)


@pytest.mark.slow
def test_row14_a_late_rank_ends_all_and_the_collective_is_named(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, *STEPS, "dist_timeout=2", "mesh={replicate: 1, shard: 2, expert: 2}")
    first, late = run_distributed(error_of, 2, recipe)
    operation = r"gloo:\w+\(\w+\[[\d, ]*\].*\), number \d+ of group \w+ failed: another rank did not join it within"
    assert re.match(rf"rank 0: {operation} dist_timeout, 2 seconds, or has ended \(.*Timed out waiting 2000ms", first)
    assert re.match(rf"rank 1: {operation}", late)
    assert list(finished(tmp_path).column("batch")) == [1, 2]


def test_other_errors_pass_through(tiny_recipe: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^mistake$"), named_collectives(600.0):
        raise RuntimeError("mistake")
