"""What happens while rows travel, how often ranks exchange anything, and how often the host waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.config import ActivationCheckpointing, Fp8Recipe
from moefoundry.moe.layer import MoELayer
from tests.distributed import run_distributed
from tests.test_parallel import LENGTH, Mode, build

NAMES = {"all_to_all_single": "exchange", "all_gather_into_tensor": "gather", "wait_tensor": "wait"}
PRODUCTS = {None: "mm", Fp8Recipe.deepseek_v3: "fp8_multiply"}
MESHES = {"one_hop": (1, 2, 2, None), "two_hop": (1, 2, 2, 1)}


class Order(TorchDispatchMode):
    """The operations of :data:`NAMES` and the products, as they come."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.known = NAMES | {product: "product"}
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.known:
            self.names.append(self.known[name])
        return func(*args, **(kwargs or {}))


class Seen(NamedTuple):
    """Operations of the passes of a model with one MoE layer; waits for the host in the forward pass."""

    forward: list[str]
    backward: list[str]
    host_waits: list[str]


def observe(mesh: str, mode: ActivationCheckpointing, fp8: Fp8Recipe | None = None) -> Seen:
    model = build(MESHES[mesh], 8, Mode(mode, fp8=fp8))
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.shared_gate = None  # products are counted
    tokens = torch.randint(67, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with Order(PRODUCTS[fp8]) as forward, host_waits() as waits:
        loss = model(tokens, tokens).total
    with Order(PRODUCTS[fp8]) as backward:
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


@pytest.fixture(scope="module", params=[(mesh, fp8) for mesh in MESHES for fp8 in PRODUCTS], ids=str)
def plain(request: pytest.FixtureRequest) -> Seen:
    mesh, fp8 = request.param
    return run_distributed(observe, 2, mesh, ActivationCheckpointing.none, fp8)[0]


def test_shared_experts_run_while_rows_travel(plain: Seen) -> None:
    """The rows leave, the shared experts' three products (gate, up, down) come next, then the wait."""
    assert "exchange product product product wait" in " ".join(plain.forward)


def test_their_backward_pass_runs_while_gradients_travel(plain: Seen) -> None:
    """The gradients of the rows leave, the products come next (six; of FP8's, Dgrad is counted), then the wait."""
    assert any("exchange" + count * " product" + " wait" in " ".join(plain.backward) for count in (3, 6))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("fp8", PRODUCTS)
def test_the_host_waits_once_a_layer(mesh: str, fp8: Fp8Recipe | None) -> None:
    """And, on a CPU, for the sizes of the groups of the experts' three FP8 products."""
    waits = run_distributed(observe, 2, mesh, ActivationCheckpointing.none, fp8)[0].host_waits
    assert waits == ["tolist"] * (1 if fp8 is None else 1 + 3)


@pytest.mark.parametrize(
    ("mesh", "forward", "backward"),
    [
        ("one_hop", 4, 3),  # counts; slots and rows; results; then the gradients of all but the counts
        pytest.param(
            "two_hop", 7, 6, marks=pytest.mark.slow
        ),  # counts; slots and rows, twice; results, twice; then gradients
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
