"""What happens while rows travel, how often ranks exchange anything, and how often the host waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.config import ActivationCheckpointing
from tests.distributed import run_distributed
from tests.test_parallel import LENGTH, Mode, build

NAMES = {"all_to_all_single": "exchange", "all_gather_into_tensor": "gather", "wait_tensor": "wait", "mm": "product"}
MESHES = {"one_hop": (1, 2, 2, None), "two_hop": (1, 2, 2, 1)}


class Order(TorchDispatchMode):
    """The operations of :data:`NAMES`, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in NAMES:
            self.names.append(NAMES[name])
        return func(*args, **(kwargs or {}))


class Seen(NamedTuple):
    """Operations of the passes of a model with one MoE layer; waits for the host in the forward pass."""

    forward: list[str]
    backward: list[str]
    host_waits: list[str]


def observe(mesh: str, mode: ActivationCheckpointing) -> Seen:
    model = build(MESHES[mesh], 8, Mode(mode))
    tokens = torch.randint(67, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with Order() as forward, host_waits() as waits:
        loss = model(tokens, tokens).total
    with Order() as backward:
        loss.backward()
    return Seen(forward.names, backward.names, waits)


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """The calls that read a tensor's values into Python."""
    calls: list[str] = []

    def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__"):
            patch.setattr(torch.Tensor, name, recording(name, getattr(torch.Tensor, name)))
        yield calls


@pytest.fixture(scope="module", params=MESHES)
def plain(request: pytest.FixtureRequest) -> Seen:
    return run_distributed(observe, 2, request.param, ActivationCheckpointing.none)[0]


def test_shared_experts_run_while_rows_travel(plain: Seen) -> None:
    """The rows leave, the shared experts' three products (gate, up, down) come next, then the wait."""
    assert "exchange product product product wait" in " ".join(plain.forward)


def test_their_backward_pass_runs_while_gradients_travel(plain: Seen) -> None:
    """The gradients of the rows leave, six products come next, then the wait."""
    assert "exchange" + 6 * " product" + " wait" in " ".join(plain.backward)


def test_the_host_waits_once_a_layer(plain: Seen) -> None:
    assert plain.host_waits == ["tolist"]


@pytest.mark.parametrize(
    ("mesh", "forward", "backward"),
    [
        ("one_hop", 4, 3),  # counts; slots and rows; results; then the gradients of all but the counts
        ("two_hop", 7, 6),  # counts; slots and rows, twice; results, twice; then gradients
    ],
)
def test_selective_checkpointing_exchanges_nothing_again(mesh: str, forward: int, backward: int) -> None:
    for mode in ActivationCheckpointing:
        seen = run_distributed(observe, 2, mesh, mode)[0]
        assert exchanges(seen.forward) == forward
        again = exchanges(seen.backward) - backward
        assert again == (forward if mode == ActivationCheckpointing.full else 0), mode


def exchanges(names: list[str]) -> int:
    return sum(name in ("exchange", "gather") for name in names)
