"""Where a step first was not finite: named when the run stops, saved, and named again by a replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moefoundry.callbacks.nonfinite import describe, watched
from moefoundry.config import Recipe, UserError
from tests.distributed import captured_output, run_distributed
from tests.train.runs import finished
from tests.train.test_health import in_the_third_batch_of_the_last_rank, infinite_gradient

Tiny = Callable[..., Recipe]
STEPS = ("max_duration=4ba", "save_interval=2ba", "eval_loader=null", "mesh={replicate: 1, shard: 2, expert: 2}")


def infinite_output() -> None:
    """In the third batch, on the last rank, 6 values of one module are infinite, and one is NaN."""
    from composer.core import Callback

    from tests.train.test_health import add_callback

    def spoil(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        spoilt = output.clone()
        spoilt[3, :6], spoilt[4, 0] = torch.inf, torch.nan
        return spoilt

    class Fault(Callback):
        def before_forward(self, state: Any, logger: Any) -> None:
            if in_the_third_batch_of_the_last_rank(state):
                module = state.model.model.layers[1].ffn.shared_experts
                if not hasattr(module, "spoilt"):
                    module.spoilt = module.register_forward_hook(spoil, prepend=True)

    add_callback(Fault(), first=True)


def stopped(recipe: Recipe, fault: Callable[[], None]) -> str:
    from moefoundry.callbacks.health import NonFiniteError
    from moefoundry.trainer import train

    fault()
    with pytest.raises(NonFiniteError) as caught:
        train(recipe)
    return str(caught.value)


def replayed(run_dir: Path, fault: Callable[[], None] | None, *overrides: str) -> str:
    from moefoundry.replay import replay

    if fault is not None:
        fault()
    with captured_output():
        return replay(run_dir, overrides)


def test_the_first_module_is_named_and_named_again_by_a_replay(tiny_recipe: Tiny, tmp_path: Path) -> None:
    messages = run_distributed(stopped, 2, tiny_recipe(tmp_path, *STEPS), infinite_output)
    assert messages[0] == messages[1]
    what, where, saved = messages[0].splitlines()
    assert what.startswith("batch 3: not finite: ")
    assert where.startswith("first: output of model.layers.1.ffn.shared_experts, float32 [")
    assert "not finite (1 NaN, 6 Inf), others from -" in where
    assert where.endswith(" on rank 1")
    assert saved == f"saved in {tmp_path}/nonfinite/ba2; repeat the step: moefoundry replay {tmp_path}"
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for text in run_distributed(replayed, 2, tmp_path, infinite_output):
        assert text == f"batch 3: {where}"
    (healthy,) = run_distributed(replayed, 1, tmp_path, None, "mesh={replicate: 1, shard: 1, expert: 1}")
    assert healthy == "batch 3: first: no parameter, input, output or gradient of a module, when the step was repeated"
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before, "a replay leaves nothing"
    assert list(finished(tmp_path).column("batch")) == [1, 2]


def test_what_is_in_no_module_is_said_to_be_in_none(tiny_recipe: Tiny, tmp_path: Path) -> None:
    (message,) = run_distributed(
        stopped, 1, tiny_recipe(tmp_path, *STEPS, "mesh={shard: 1, expert: 1}"), infinite_gradient
    )
    assert "\nfirst: no parameter, input, output or gradient of a module, when the step was repeated\n" in message


def test_a_run_without_such_a_step_has_none_to_replay(tmp_path: Path) -> None:
    from moefoundry.replay import replay

    with pytest.raises(UserError, match="no step that was not finite"):
        replay(tmp_path)


class Half(torch.nn.Module):
    """A product between two layers that overflows going forward, or a root whose gradient does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, root: bool) -> torch.Tensor:
        hidden = self.first(x)
        return self.last((hidden * 0).sqrt() if root else hidden * 1e30 * 1e30)


@pytest.mark.parametrize(
    ("root", "text"), [(False, "input of last, float32 [2, 4]: "), (True, "gradient of the output of first, float32")]
)
def test_inputs_and_gradients_are_looked_at(root: bool, text: str) -> None:
    model = Half()
    with watched(model) as found:
        model(torch.ones(2, 4), root).sum().backward()
    assert found[0].text.startswith(text)
    with watched(model) as clean:
        model.last(torch.ones(2, 4)).sum().backward()
    assert clean == []
    model.last.weight.data[0, 1] = torch.nan
    with watched(model) as spoilt:
        model.last(torch.ones(2, 4))
    assert spoilt[0].text == "parameter last.weight, " + describe(model.last.weight.detach())


def test_share_and_range_are_described() -> None:
    values = torch.tensor([[1.0, torch.nan, -2.0, torch.inf], [0.5, -torch.inf, 0.0, 0.0]]).bfloat16()
    assert describe(values) == "bfloat16 [2, 4]: 37.50% not finite (1 NaN, 2 Inf), others from -2 to 1"
    assert describe(torch.full((3,), torch.nan)) == "float32 [3]: 100.00% not finite (3 NaN), no other"
