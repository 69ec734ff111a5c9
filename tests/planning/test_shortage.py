"""What is said where memory has ended: kinds beside the plan, the cause, and the smallest change that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moefoundry.config import MeshConfig, Recipe, load_recipe
from moefoundry.mesh import resolve_degrees
from moefoundry.planning import shortage
from moefoundry.planning.memory import Memory, memory
from moefoundry.planning.outline import Outline
from moefoundry.planning.shortage import Allocator, Usage, cause, explain, measure, smallest_change
from tests.conftest import QUICKSTART

ONE = resolve_degrees(MeshConfig(), 1, 1)
WIDE = ("model.d_model=1024", "model.moe.expert_hidden_size=512", "max_seq_len=2048", "global_train_batch_size=8")


def recipe(*changes: str) -> Recipe:
    return load_recipe(QUICKSTART, [*WIDE, "device_train_microbatch_size=8", *changes])


def planned(own: Recipe, size: int) -> Memory:
    return memory(Outline(own).shard(own, ONE), own, size)


def used(plan: Memory, total: int, factor: float = 1.0, **kinds: int) -> Usage:
    """What a run uses that keeps to its plan, but for transient memory, ``factor`` times that."""
    transient = int(plan.peak.total * factor)
    return replace(Usage(plan.parameters, plan.gradients, plan.optimizer, transient, 0, 0, total), **kinds)


def test_kinds_are_measured() -> None:
    model = nn.Linear(256, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    shortage_of = Allocator(peak=10 * 65536, reserved=12 * 65536, free=65536, total=14 * 65536)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortage, "allocator", lambda device: shortage_of)
        found = measure(model, optimizer, torch.device("cpu"))
    size = 65536
    expected = Usage(size, size, 2 * size, 6 * size, 2 * size, size, 14 * size)
    assert replace(found, optimizer=2 * size, transient=6 * size) == expected
    assert found.optimizer == 2 * size + 4, "and the step, a number"
    assert model.weight.grad is None
    assert shortage.allocator(torch.device("cpu")).peak > 1e7


def test_the_smallest_change_is_a_smaller_micro_batch_if_one_fits() -> None:
    own = recipe()
    plan, sharded = planned(own, 8), Outline(own).shard(own, ONE)
    for wanted in (4, 2, 1):
        total = planned(own, wanted).total + 1
        assert smallest_change(own, sharded, 1, used(plan, total)) == {"device_train_microbatch_size": wanted}
    beyond = used(plan, planned(own, 4).total, 1.5)
    assert smallest_change(own, sharded, 1, beyond) == {"device_train_microbatch_size": 2}, "half as much again is used"
    assert smallest_change(own, sharded, 1, used(plan, 10**6)) == {}


def test_with_one_sequence_activations_are_recomputed() -> None:
    own = recipe("device_train_microbatch_size=1")
    plan, sharded = planned(own, 1), Outline(own).shard(own, ONE)
    modes = [replace(own, activation_checkpointing=mode) for mode in ("selective", "full")]
    totals = [memory(sharded, each, 1).total for each in modes]
    assert plan.total > totals[0] > totals[1]
    for each, total in zip(modes, totals, strict=True):
        found = smallest_change(own, sharded, 1, used(plan, total))
        assert found == {"activation_checkpointing": each.activation_checkpointing}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": 1.5}, "beyond the plan: activations, gathered parameters and logits, by "),
        ({"optimizer": 10**10}, "beyond the plan: optimizer state, by "),
        ({"gaps": 2 * 10**9}, "expandable_segments:True"),
        ({"others": 2 * 10**9}, "other processes have 1.86 GiB"),
        ({}, "nothing is beyond the plan"),
    ],
)
def test_the_cause_is_named(changes: dict[str, float], said: str) -> None:
    plan = planned(recipe(), 8)
    assert said in cause(plan, used(plan, 10**10, **changes))  # type: ignore[arg-type]


def test_a_stage_of_a_curriculum_is_named() -> None:
    own = recipe("curriculum={short: {until: 3ba, max_seq_len: 1024}, long: {}}")
    text = explain(own, ONE, 5, used(planned(own, 8), planned(own, 4).total + 1))
    assert text.splitlines()[-1] == "smallest change that fits: curriculum.long.device_train_microbatch_size=4"
    nothing = explain(own, ONE, 5, used(planned(own, 8), 10**6))
    assert "moefoundry recommend RECIPE --world-size 1" in nothing.splitlines()[-1]
