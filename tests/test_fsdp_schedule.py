"""When FSDP gathers and reduces in a step of 64 ranks, taken in one process, and when the host waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moefoundry.config import load_recipe
from moefoundry.ops.sizes import REDUCTIONS
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed
from tests.test_many_ranks import MODEL, SEQUENCE, WORLD, sharded

CHANGES = [
    *MODEL,
    "model.n_layers=3",
    "model.n_dense_layers=0",
    "model.ffn_hidden_size=null",
    "model.mtp={depth: 1, loss_weight: 0.1}",
    "mesh={shard: 64, expert: 8}",
    "precision.compute=bf16",
]

TOLIST = Tensor.tolist

Event = tuple[str, str]


def events_of_a_step() -> tuple[list[Event], list[tuple[str, list[str]]]]:
    """Begins of gathers and waits for them, by unit, in forward and backward; and for each unit, those whose gradients
    are on their way when its own go."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    events: list[Event] = []
    under_way: list[tuple[str, list[str]]] = []
    reducing: list[str] = []
    called: list[Any] = []

    def recorded(name: str, before: Callable[[Any], None], after: Callable[[Any], None] = lambda group: None) -> None:
        method = getattr(FSDPParamGroup, name)

        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            before(self)
            result = method(self, *args, **options)
            after(self)
            return result

        setattr(FSDPParamGroup, name, wrapped)

    def begins(group: Any) -> None:
        called.append(group._all_gather_result)

    def has_begun(group: Any) -> None:
        if called.pop() is None and group._all_gather_result is not None:
            events.append(("gather", group._module_fqn))

    def waits(group: Any) -> None:
        if group._all_gather_result is not None:
            events.append(("wait", group._module_fqn))

    def reduced(group: Any) -> None:
        reducing.append(group._module_fqn)
        count = len(getattr(group.comm_ctx, "reduce_scatter_states", [None]))  # torch before 2.14 has one
        under_way.append((group._module_fqn, reducing[-count:]))

    recorded("unshard", begins, has_begun)
    recorded("wait_for_unshard", waits)
    recorded("post_backward", lambda group: None, reduced)
    recipe = load_recipe(QUICKSTART, CHANGES, WORLD)
    with sharded(recipe) as (model, _):
        ids = torch.arange(SEQUENCE).unsqueeze(0)
        loss = model(ids, ids).total
        events.append(("backward", ""))
        loss.backward()
    return events, under_way


@pytest.fixture(scope="module")
def step() -> tuple[list[Event], list[tuple[str, list[str]]]]:
    [found] = run_distributed(events_of_a_step, 1)
    return found


def late(events: list[Event]) -> list[str]:
    """Units whose gather begins when no other is to be waited for before."""
    found = []
    for unit in (unit for event, unit in events if event == "wait"):
        begun, waited = events.index(("gather", unit)), events.index(("wait", unit))
        if not any(event == "wait" for event, _ in events[begun:waited]):
            found.append(unit)
    return found


def test_units_are_gathered_while_others_compute(step: tuple[list[Event], Any]) -> None:
    events, _ = step
    turn = events.index(("backward", ""))
    forward, backward = events[:turn], events[turn + 1 :]
    gathered = {unit for event, unit in backward if event == "gather"}
    assert {unit for unit in gathered if unit.startswith("layers.1")} == {
        *("layers.1", "layers.1.ffn.router", "layers.1.ffn.experts")
    }, "the model has other units than this test is about"
    further = [unit for unit in late(forward) if unit.startswith("mtp")]
    assert further, "in the forward pass those of multi-token prediction are not gathered ahead: an evaluation has none"
    assert [unit for unit in late(forward) if unit not in further] == ["", "embed_tokens"]
    assert "embed_tokens" not in gathered, "its gradient does not need it"
    assert late(backward) == ["mtp.0"], "it has the losses beside, and its parts have it"


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "set_reduce_scatter_max_input_buffers"),
    reason="torch before 2.14 has one reduction under way",
)
def test_a_block_goes_on_while_its_experts_are_reduced(step: tuple[Any, list[tuple[str, list[str]]]]) -> None:
    _, under_way = step
    beside = dict(under_way)
    assert beside["layers.1.ffn.router"] == ["layers.1.ffn.experts", "layers.1.ffn.router"]
    assert beside["layers.1"] == ["layers.1.ffn.router", "layers.1"], "the experts' buffer is free again"
    assert max(len(units) for _, units in under_way) == REDUCTIONS


def reads_by_the_host(change: str, mode: str) -> tuple[int, int]:
    """Times that the host reads sizes in the forward and in the backward pass of a step."""
    reads = []

    def counted(values: Tensor) -> Any:
        reads.append(values.shape)
        return TOLIST(values)

    recipe = load_recipe(QUICKSTART, [*CHANGES, change, f"activation_checkpointing={mode}"], WORLD)
    with sharded(recipe) as (model, _):
        ids = torch.arange(SEQUENCE).unsqueeze(0)
        with mock.patch.object(Tensor, "tolist", counted):
            loss = model(ids, ids).total
            forward = len(reads)
            loss.backward()
    return forward, len(reads) - forward


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("change", ["mesh.expert=8", "mesh={shard: 64, expert: 32, ranks_per_node: 8}"])
def test_the_host_waits_once_a_layer_and_not_again_where_it_is_recomputed(change: str, mode: str) -> None:
    assert run_distributed(reads_by_the_host, 1, change, mode) == [(4, 0)], "three layers, and one of MTP"
