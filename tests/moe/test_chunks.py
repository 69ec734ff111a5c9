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


def started(*numbers: int) -> list[str]:
    return [f"start {number}" for number in numbers]


def waited(*numbers: int) -> list[str]:
    return [f"wait {number}" for number in numbers]


def passed_on(*pairs: tuple[int, int]) -> list[str]:
    """Exchanges that are waited for, each before another is started with its rows."""
    return [event for first, second in pairs for event in (f"wait {first}", f"start {second}")]


GO, BACK = ["product"] * FORWARD, ["product"] * BACKWARD
IN_ONE_HOP = (
    [
        *started(0), *waited(0),  # counts
        *started(1, 2, 3),  # experts and weights of three chunks
        *started(4, 5, 6),  # their tokens
        *waited(1, 4), *GO, *started(7),  # results of the first chunk
        *waited(2, 5), *GO, *started(8),
        *waited(3, 6), *GO, *started(9),
        *waited(7, 8, 9),
    ],
    [
        *started(0, 1, 2),  # gradients of the results: those of the last chunk are needed first
        *waited(0), *BACK, *started(3, 4),  # gradients of its tokens and weights
        *waited(1), *BACK, *started(5, 6),
        *waited(2), *BACK, *started(7, 8),
        *waited(7, 5, 3, 8, 6, 4),
    ],
)  # fmt: skip
IN_TWO_HOPS = (
    [
        *started(0, 1, 2, 3, 4, 5),  # counts were gathered; as above, between nodes
        *passed_on((0, 6), (3, 7)),  # the first chunk, inside the node
        *passed_on((1, 8), (4, 9)), *waited(6, 7), *GO, *started(10),
        *passed_on((2, 11), (5, 12)), *waited(8, 9), *GO, *started(13), *passed_on((10, 14)),
        *waited(11, 12), *GO, *started(15), *passed_on((13, 16)),
        *passed_on((15, 17)),
        *waited(14, 16, 17),
    ],
    [
        *started(0, 1, 2),
        *passed_on((0, 3)),
        *passed_on((1, 4)), *waited(3), *BACK, *started(5, 6),
        *passed_on((2, 7)), *waited(4), *BACK, *started(8, 9), *passed_on((5, 10), (6, 11)),
        *waited(7), *BACK, *started(12, 13), *passed_on((8, 14), (9, 15)),
        *passed_on((12, 16), (13, 17)),
        *waited(16, 14, 10, 17, 15, 11),
    ],
)  # fmt: skip


def test_the_order_of_three_chunks(passes: dict[Way, Passes]) -> None:
    """What is computed, and what is under way meanwhile; the backward pass has the same order, from its end."""
    forward, backward, _ = passes[Way()]
    assert (forward, backward) == (IN_ONE_HOP if forward[1] == "wait 0" else IN_TWO_HOPS)


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
