"""Tokens that go to their experts in chunks: the order of exchanges and products, and the same training."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.config import ActivationCheckpointing, AuxLossScope, BalanceConfig, Fp8Recipe, MoEConfig
from moefoundry.moe.layer import MoELayer
from tests.distributed import run_distributed
from tests.moe.test_dispatch import dispatcher_of
from tests.moe.test_overlap import MESHES, host_waits
from tests.test_parallel import LENGTH, Mode, build, full

CHUNKS = 3
NONE, SELECTIVE, FULL = (ActivationCheckpointing[name] for name in ("none", "selective", "full"))


class Schedule(TorchDispatchMode):
    """The exchanges and the experts' products, in their order.

    Attributes:
        events: ``start N`` and ``wait N`` of exchange N, and ``product``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.started = 0
        self._under_way: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name == "all_to_all_single":
            self._under_way[out.untyped_storage()._cdata] = self.started
            self.events.append(f"start {self.started}")
            self.started += 1
        elif name == "wait_tensor":
            number = self._under_way.pop(args[0].untyped_storage()._cdata, None)
            self.events += [] if number is None else [f"wait {number}"]
        elif name == "_grouped_mm":
            self.events.append("product")
        return out


class Passes(NamedTuple):
    """Events of a model with one MoE layer; how often the host waited in the forward pass."""

    forward: list[str]
    backward: list[str]
    host_waits: int


class Way(NamedTuple):
    """How the model is computed."""

    checkpointing: ActivationCheckpointing = NONE
    chunks: int = CHUNKS


WAYS = [Way(), Way(SELECTIVE), Way(FULL), Way(chunks=1)]


def observe(mesh: str) -> dict[Way, Passes]:
    return {way: observe_one(mesh, way) for way in WAYS}


def observe_one(mesh: str, way: Way) -> Passes:
    model = build(MESHES[mesh], 8, Mode(way.checkpointing, chunks=way.chunks))
    tokens = torch.randint(67, (2, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    with Schedule() as forward, host_waits() as waits:
        loss = model(tokens, tokens).total
    with Schedule() as backward:
        loss.backward()
    return Passes(forward.events, backward.events, len(waits))


@pytest.fixture(scope="module", params=MESHES)
def passes(request: pytest.FixtureRequest) -> dict[Way, Passes]:
    return run_distributed(observe, 2, request.param)[0]


@pytest.fixture
def one_hop(request: pytest.FixtureRequest, passes: dict[Way, Passes]) -> dict[Way, Passes]:
    if "one_hop" not in request.node.name:
        pytest.skip("two hops pass rows on in between")
    return passes


def under_way(events: list[str]) -> list[int]:
    """How many exchanges are under way at each product."""
    counts, now = [], 0
    for event in events:
        now += event.startswith("start") - event.startswith("wait")
        counts += [now] if event == "product" else []
    assert now == 0, "every exchange that was started has been waited for"
    return counts


def each(counts: list[int], products: int) -> list[int]:
    return [count for count in counts for _ in range(products)]


FORWARD, BACKWARD = 3, 6
"""Products of a chunk: gate, up and down; then two gradients of each."""


def test_the_order_of_three_chunks_in_one_hop(one_hop: dict[Way, Passes]) -> None:
    """Counts; experts and weights of three chunks; their tokens. Then each chunk is waited for, computed and returned.
    The backward pass has the same order, from its end."""
    forward, backward, _ = one_hop[Way()]
    products = ["product"] * FORWARD
    assert forward == [
        *("start 0", "wait 0", "start 1", "start 2", "start 3", "start 4", "start 5", "start 6"),
        *("wait 1", "wait 4", *products, "start 7"),
        *("wait 2", "wait 5", *products, "start 8"),
        *("wait 3", "wait 6", *products, "start 9"),
        *("wait 7", "wait 8", "wait 9"),
    ]
    products = ["product"] * BACKWARD
    assert backward == [
        *("start 0", "start 1", "start 2"),  # gradients of the results: those of the last chunk are needed first
        *("wait 0", *products, "start 3", "start 4"),
        *("wait 1", *products, "start 5", "start 6"),
        *("wait 2", *products, "start 7", "start 8"),
        *("wait 7", "wait 5", "wait 3", "wait 8", "wait 6", "wait 4"),
    ]


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing)
def test_exchanges_are_under_way_at_every_product(
    passes: dict[Way, Passes], checkpointing: ActivationCheckpointing
) -> None:
    """Forward, at the first chunk: experts, weights and tokens of the two others; and so on."""
    forward, backward, host_waits = passes[Way(checkpointing)]
    assert under_way(forward) == each([4, 3, 2], FORWARD)
    again = each([4, 3, 2], FORWARD) if checkpointing == FULL else []
    assert under_way(backward) == again + each([2, 3, 4], BACKWARD)
    assert host_waits == 1


def test_one_chunk_is_computed_while_nothing_is_under_way(passes: dict[Way, Passes]) -> None:
    whole = passes[Way(chunks=1)]
    assert set(under_way(whole.forward)) == set(under_way(whole.backward)) == {0}


def layer(chunks: int, capacity: float | None) -> MoELayer:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    balance = BalanceConfig(aux_loss_scope=AuxLossScope.micro_batch)
    cfg = MoEConfig(
        num_experts=8,
        top_k=3,
        expert_hidden_size=5,
        num_shared_experts=1,
        projection_bias=True,
        balance=balance,
        capacity_factor=capacity,
        backend="loop",
        dispatch_chunks=chunks,
    )
    module = MoELayer(6, cfg)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    for name, weight in list(module.experts.named_parameters()):
        setattr(module.experts, name, nn.Parameter(weight.detach()[share]))
    return module.double()


def on_ranks(kind: str, capacity: float | None) -> list[list[Tensor]]:
    """Output, losses and gradients of one layer, by number of chunks; ranks have 9, 0, 3 and 5 tokens of 9."""
    rank, results = dist.get_rank(), []
    real = torch.arange([9, 0, 3, 5][rank])
    dispatcher = dispatcher_of(kind, 8)
    for chunks in (1, 2, 4, 11):
        module = layer(chunks, capacity)
        module.dispatcher = dispatcher
        x = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).requires_grad_()
        out, stats = module(x, real)
        (out.square().sum() + (stats.z_loss if len(real) else 0)).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        results.append([out.detach(), stats.dropped_slots, x.grad, *grads])
    return results


@pytest.mark.parametrize("kind", ["one_hop", "two_hop"])
@pytest.mark.parametrize("capacity", [None, 0.7])
def test_a_layer_with_padding_and_capacity_is_the_same_in_chunks(kind: str, capacity: float | None) -> None:
    for results in run_distributed(on_ranks, 4, kind, capacity):
        for result in results[1:]:
            for got, expected in zip(result, results[0], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def evaluated() -> list[tuple[list[str], Tensor]]:
    tokens = torch.randint(67, (2, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for chunks in (1, CHUNKS):
        model = build(MESHES["one_hop"], 8, Mode(chunks=chunks)).eval()
        with torch.no_grad(), Schedule() as schedule:
            results.append((schedule.events, model(tokens)))
    return results


def test_evaluation_does_not_go_in_chunks() -> None:
    whole, in_chunks = run_distributed(evaluated, 2)[0]
    assert whole[0] == in_chunks[0]
    assert torch.equal(whole[1], in_chunks[1])


def in_fp8() -> list[tuple[Tensor, dict[str, Tensor]]]:
    tokens = torch.randint(67, (2, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for chunks in (1, CHUNKS):
        model = build(MESHES["one_hop"], 8, Mode(fp8=Fp8Recipe.deepseek_v3, chunks=chunks))
        loss = model(tokens, tokens).total
        loss.backward()
        results.append((loss.detach(), {name: full(parameter.grad) for name, parameter in model.named_parameters()}))
    return results


def test_fp8_rows_and_a_cache_of_activations_go_in_chunks() -> None:
    """Rows are quantized alike; gradients of weights sum over other tiles of tokens, and so are near."""
    (loss, grads), (other_loss, other_grads) = run_distributed(in_fp8, 2)[0]
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert (other_grads[name] - grad).norm() <= 0.05 * grad.norm(), name
