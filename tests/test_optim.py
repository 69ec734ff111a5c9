"""BF16 moments: the update is torch's, bit for bit, on every mesh; only what is stored has been rounded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import AdamW

from moefoundry import optim
from moefoundry.ops.stochastic_rounding import hash_bits, lower_half, round_stochastically, upper_half
from moefoundry.optim import Bf16MomentsAdamW, ShardAdamW
from tests.distributed import run_distributed
from tests.memory import PeakMemory
from tests.resumed_optimizer import go_on_together

Placements = Sequence[Shard | Replicate]
SHAPES = {"norm": (48,), "wide": (7, 32), "experts": (4, 6, 16), "head": (33, 16)}
BETAS, EPS = (0.9, 0.95), 1e-8
SEEDS = pytest.mark.parametrize("seed", [None, 17], ids=["nearest", "stochastic"])
SLOTS = ("exp_avg", "exp_avg_sq")


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def groups(parameters: dict[str, nn.Parameter], named: bool = True) -> list[dict[str, Any]]:
    """One that decays, and one that does not."""
    pairs = list(parameters.items()) if named else list(parameters.values())
    return [{"params": pairs[1:], "weight_decay": 0.1}, {"params": pairs[:1], "weight_decay": 0.0}]


def gradients(steps: int) -> Iterator[dict[str, Tensor]]:
    """For each step; some parameter has none in the second one."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        drawn = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
        yield {name: gradient for name, gradient in drawn.items() if (step, name) != (1, "wide")}


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: int = 6) -> Iterator[int]:
    """Steps with a rate that changes as a schedule would change it."""
    for step, drawn in enumerate(gradients(steps)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        for name, parameter in parameters.items():
            gradient = drawn.get(name)
            if gradient is not None and isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
        yield step


def bits_for(seed: int, name: str, updates: int) -> Tensor:
    """By the definition: a key of seed, name and age, plus the element's place."""
    digest = hashlib.sha256(f"moments/{seed}/{name}/{updates}".encode()).digest()
    places = torch.arange(torch.Size(SHAPES[name]).numel()) + int.from_bytes(digest[:4], "little")
    return hash_bits(places.to(torch.int32)).view(SHAPES[name])


def rounded(moment: Tensor, slot: str, bits: Tensor | None) -> Tensor:
    if bits is None:
        return moment.bfloat16()
    return round_stochastically(moment, lower_half(bits) if slot == "exp_avg" else upper_half(bits))


@SEEDS
def test_equals_torch_with_rounded_moments(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    """Bit for bit, though moments are widened in pieces of 64 elements."""
    monkeypatch.setattr(optim, "WIDE_ELEMENTS", 64)
    mine, theirs = weights(), weights()
    ours = Bf16MomentsAdamW(groups(mine), 1.0, BETAS, EPS, seed)
    reference = AdamW(groups(theirs, named=False), lr=1.0, betas=BETAS, eps=EPS, fused=True)
    updates = dict.fromkeys(SHAPES, 0)
    for _ in zip(train(ours, mine), train(reference, theirs), strict=True):
        for name, parameter in theirs.items():
            assert torch.equal(mine[name], parameter), name
            if parameter.grad is None:
                continue
            bits = None if seed is None else bits_for(seed, name, updates[name])
            updates[name] += 1
            for slot in SLOTS:
                moment = reference.state[parameter][slot]
                moment.copy_(rounded(moment, slot, bits))
                stored = ours.state[mine[name]][slot]
                assert stored.dtype == torch.bfloat16
                assert torch.equal(stored.float(), moment), (name, slot)
    assert updates == {name: 5 if name == "wide" else 6 for name in SHAPES}
    assert {name: int(ours.state[mine[name]]["step"]) for name in SHAPES} == updates


@pytest.mark.gpu
def test_equals_torchs_own_kernel_for_bf16_moments() -> None:
    """Which later versions have on CUDA, rounding to the nearest; it corrects for the start in double."""
    mine, theirs = ({n: nn.Parameter(p.detach().cuda()) for n, p in weights().items()} for _ in range(2))
    ours = Bf16MomentsAdamW(groups(mine), 1e-2, BETAS, EPS)
    reference = AdamW(groups(theirs, named=False), lr=1e-2, betas=BETAS, eps=EPS, fused=True)
    for parameter in theirs.values():
        narrow = {slot: torch.zeros_like(parameter, dtype=torch.bfloat16) for slot in SLOTS}
        reference.state[parameter] = {"step": torch.zeros((), device="cuda"), **narrow}
    for drawn in gradients(6):
        for parameters in (mine, theirs):
            for name, parameter in parameters.items():
                parameter.grad = drawn[name].cuda() if name in drawn else None
        ours.step()
        try:
            reference.step()
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} takes no such moments: {error}")
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name], parameter, rtol=1e-6, atol=1e-8)
        assert all(torch.equal(ours.state[mine[name]][slot], reference.state[parameter][slot]) for slot in SLOTS)


@SEEDS
def test_temporaries_are_bounded(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    monkeypatch.setattr(optim, "WIDE_ELEMENTS", 64)
    parameters = weights()
    optimizer = Bf16MomentsAdamW(groups(parameters), 1.0, BETAS, EPS, seed)
    steps = train(optimizer, parameters)
    next(steps)  # allocates the state
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    with PeakMemory() as memory:
        optimizer.step()
    tensors = [t for p in parameters.values() for t in (p, p.grad, *(optimizer.state[p][slot] for slot in SLOTS))]
    both_wide = 2 * 4 * 64
    assert memory.peak - sum(t.nbytes for t in tensors if t is not None) < (2 if seed is None else 4) * both_wide


# ------------------------------------------------------------------------------------------------------------- meshes


def sharded(parameters: dict[str, nn.Parameter], shape: tuple[int, ...], placements: dict[str, Placements]) -> Any:
    mesh = init_device_mesh("cpu", shape)
    return {
        name: nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements[name]))
        for name, parameter in parameters.items()
    }


def final_state(shape: tuple[int, ...], placements: dict[str, Placements], seed: int | None) -> dict[str, list[Tensor]]:
    parameters = sharded(weights(), shape, placements) if placements else weights()
    optimizer = Bf16MomentsAdamW(groups(parameters), 1.0, BETAS, EPS, seed)
    list(train(optimizer, parameters))
    tensors = {name: [p.detach(), *(optimizer.state[p][slot] for slot in SLOTS)] for name, p in parameters.items()}
    return {name: [t.full_tensor() if isinstance(t, DTensor) else t for t in ts] for name, ts in tensors.items()}


MESHES: list[tuple[tuple[int, ...], dict[str, Placements]]] = [
    ((2,), {name: [Shard(0)] for name in SHAPES}),  # 7 and 33 rows, unevenly
    ((2, 2), {name: [Replicate(), Shard(0)] for name in SHAPES} | {"experts": [Shard(0), Shard(1)]}),
]


@SEEDS
@pytest.mark.parametrize(("shape", "placements"), MESHES, ids=["2", "2x2"])
def test_every_mesh_computes_the_same_bits(
    shape: tuple[int, ...], placements: dict[str, Placements], seed: int | None
) -> None:
    """Copies included. Shards are whole vectors of 16: torch's kernel ends a tensor with other instructions."""
    expected = final_state((), {}, seed)
    for found in run_distributed(final_state, torch.Size(shape).numel(), shape, placements, seed):
        for name, tensors in expected.items():
            assert all(map(torch.equal, found[name], tensors)), name


def by_torch_and_by_shards() -> list[list[Tensor]]:
    """This rank's parameters and moments, once by torch's AdamW on DTensors and once by ours."""
    shape, placements = MESHES[0]
    found = []
    for kind in (AdamW, ShardAdamW):
        parameters = sharded(weights(), shape, placements)
        optimizer = kind(groups(parameters, named=False), lr=1.0, betas=BETAS, eps=EPS, fused=True)
        list(train(optimizer, parameters, steps=3))
        tensors = (t for p in parameters.values() for t in (p.detach(), *(optimizer.state[p][slot] for slot in SLOTS)))
        found.append([tensor.to_local() for tensor in tensors])
    return found


def test_shards_are_updated_as_torch_updates_dtensors() -> None:
    for theirs, ours in run_distributed(by_torch_and_by_shards, 2):
        assert len(ours) == 3 * len(SHAPES)
        assert all(map(torch.equal, ours, theirs))


def runs_of_experts(experts: int) -> tuple[list[int], list[int]]:
    """Places in the whole tensor, by the runs, and by what FSDP left on this rank of a tensor of places."""
    from moefoundry.config import MeshConfig
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.parallel import _placement_of_experts

    meshes = build_meshes(resolve_degrees(MeshConfig(1, 4, 2), 4), "cpu")
    places = torch.arange(experts * 6 * 5, dtype=torch.float32).view(experts, 6, 5)
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(places, meshes.expert, [Shard(0)]))
    place = partial(_placement_of_experts, ranks=meshes.expert_fsdp.size(-1))
    fully_shard(module, mesh=meshes.expert_fsdp, shard_placement_fn=place)
    runs = optim._runs_of(module.weight)
    assert dist.get_world_size() == 4
    found = [run.first + index for run in runs for index in range(run.size)]
    return found, module.weight.to_local().flatten().int().tolist()


@pytest.mark.parametrize("experts", [6, 2], ids=["whole-experts", "rows-of-experts"])
def test_places_of_experts_that_two_axes_divide(experts: int) -> None:
    results = run_distributed(runs_of_experts, 4, experts)
    assert all(found == places for found, places in results)
    assert sorted(place for _, places in results for place in places) == list(range(experts * 6 * 5))


# -------------------------------------------------------------------------------------------------------------- state


@SEEDS
def test_state_dict_restores_every_bit(seed: int | None) -> None:
    mine, copy = weights(), weights()
    ours = Bf16MomentsAdamW(groups(mine), 1.0, BETAS, EPS, seed)
    steps = train(ours, mine)
    for _ in range(3):
        next(steps)
    restored = Bf16MomentsAdamW(groups(copy), 1.0, BETAS, EPS, seed)
    go_on_together(steps, ours, mine, restored, copy)
    for name, parameter in mine.items():
        assert torch.equal(copy[name], parameter)
        assert all(torch.equal(restored.state[copy[name]][s], ours.state[parameter][s]) for s in SLOTS)


def test_state_of_torchs_adamw_loads_and_is_loaded() -> None:
    theirs, mine = weights(), weights()
    reference = AdamW(groups(theirs, named=False), lr=1.0, betas=BETAS, eps=EPS, fused=True)
    list(train(reference, theirs))
    ours = Bf16MomentsAdamW(groups(mine), 1.0, BETAS, EPS, seed=3)
    ours.load_state_dict(reference.state_dict())
    for name, parameter in theirs.items():
        for slot in SLOTS:
            assert torch.equal(ours.state[mine[name]][slot], reference.state[parameter][slot].bfloat16())
    next(train(ours, mine, steps=1))
    reference.load_state_dict(ours.state_dict())
    assert all(reference.state[p][slot].dtype == torch.float32 for p in theirs.values() for slot in SLOTS)


def test_parameters_must_be_fp32_and_named() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"head is torch\.bfloat16; master weights are fp32"):
        Bf16MomentsAdamW([{"params": [("head", weight)]}], 1.0, BETAS, EPS)
    with pytest.raises(ValueError, match="need names"):
        Bf16MomentsAdamW([{"params": [nn.Parameter(torch.zeros(3))]}], 1.0, BETAS, EPS)


# ------------------------------------------------------------------------------------------- what rounding does in time


def second_moments(beta2: float, moments: str) -> tuple[float, float]:
    """Mean ``exp_avg_sq`` after normal gradients over its memory's length, then after as many ten times smaller."""
    parameter = nn.Parameter(torch.zeros(1000))
    named = [{"params": [("weight", parameter)]}]
    if moments == "fp32":
        optimizer = AdamW(named, lr=0.0, betas=(0.9, beta2), fused=True)
    else:
        optimizer = Bf16MomentsAdamW(named, 0.0, (0.9, beta2), EPS, 1 if moments == "stochastic" else None)
    generator = torch.Generator().manual_seed(2)
    means = []
    for scale in (1.0, 0.1):
        for _ in range(round(1 / (1 - beta2))):
            parameter.grad = torch.randn(1000, generator=generator) * scale
            optimizer.step()
        means.append(optimizer.state[parameter]["exp_avg_sq"].double().mean().item())
    return means[0], means[1]


@pytest.mark.parametrize(
    ("beta2", "moments", "tolerance"),
    [(0.95, "nearest", 0.005), (0.95, "stochastic", 0.005), (0.99, "stochastic", 0.01)],
)
def test_the_second_moment_follows_the_gradients(beta2: float, moments: str, tolerance: float) -> None:
    """As with fp32, to what a mean over 1000 values of relative error 2**-9 and more can show."""
    assert second_moments(beta2, moments) == pytest.approx(second_moments(beta2, "fp32"), rel=tolerance)


def test_the_second_moment_sticks_if_it_moves_by_less_than_bf16_can_show() -> None:
    """What the recipe's check refuses; stochastic rounding has no such limit."""
    (before, after), exact = second_moments(0.998, "nearest"), second_moments(0.998, "fp32")
    assert exact[1] < 0.4 * exact[0]
    assert after > 0.95 * before
    assert second_moments(0.998, "stochastic") == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("beta", "falls"), [(1 - 2**-8, True), (1 - 2**-8 + 1e-4, False)], ids=["limit", "beyond"])
def test_the_limit_of_the_recipes_check(beta: float, falls: bool) -> None:
    """Every BF16 significand, without a gradient."""
    significands = torch.arange(128, 256).bfloat16() / 128
    assert bool(((significands.float() * beta).bfloat16() < significands).all()) == falls
