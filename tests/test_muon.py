"""Muon: the update is torch's, bit for bit, on every mesh, and which parameters it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry import muon
from moefoundry.config import MuonConfig
from moefoundry.model.transformer import MoETransformer
from moefoundry.muon import Muon, build_muon
from moefoundry.ops import newton_schulz
from moefoundry.ops.matrices import orthogonalization_flops
from moefoundry.ops.newton_schulz import orthogonalize
from moefoundry.optim import ShardAdamW
from tests.distributed import run_distributed
from tests.memory import PeakMemory
from tests.model.tiny import tiny_config
from tests.resumed_optimizer import go_on_together

Placements = Sequence[Shard | Replicate]
MATRICES = {"wide": (7, 32), "tall": (33, 16), "few": (3, 16), "square": (24, 24), "experts": (4, 6, 16), "b": (16, 5)}
OTHERS = {"norm": (64,), "embedding": (33, 8)}
BETAS, EPS = (0.9, 0.95), 1e-8


def weights(shapes: dict[str, Any]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def muon_of(parameters: dict[str, nn.Parameter]) -> Muon:
    """Matrices of different meshes are in different groups, as those of a model are."""
    stacks = [p for name, p in parameters.items() if name in MATRICES and p.dim() == 3]
    flat = [p for name, p in parameters.items() if name in MATRICES and p.dim() == 2]
    groups = [{"params": params, "weight_decay": 0.1, "momentum": 0.95} for params in (flat, stacks)]
    others = [p for name, p in parameters.items() if name in OTHERS]
    return Muon([*groups, {"params": others, "weight_decay": 0.0}], 1.0, BETAS, EPS)


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: int = 4) -> Iterator[int]:
    """Steps with a rate that changes as a schedule would change it; one matrix has no gradient in the second."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        for name, shape in (MATRICES | OTHERS).items():
            drawn = torch.randn(shape, generator=generator) * 0.1
            if name not in parameters:
                continue
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
            parameter.grad = None if (step, name) == (1, "wide") else drawn
        optimizer.step()
        yield step


# ------------------------------------------------------------------------------------------------------------ update


@pytest.mark.parametrize("shape", [(64, 64), (16, 256), (300, 40), (3, 32, 48)], ids=str)
def test_singular_values_come_near_1(shape: tuple[int, ...]) -> None:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(drawn)
    found = orthogonalize(drawn.bfloat16())
    assert found.dtype == torch.bfloat16
    assert found.shape == shape
    brought = torch.linalg.svdvals(found.float())[values > 0.01 * values.amax(-1, keepdim=True)]
    assert brought.min() > 0.6
    assert brought.max() < 1.3
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    assert torch.dist(found.float(), left @ right) / torch.linalg.matrix_norm(left @ right).norm() < 0.3


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 8, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("shape", [(6, 16, 32), (6, 32, 16), (5, 7, 33), (4, 2, 2), (3, 64, 128)], ids=str)
def test_a_matrix_has_the_same_bits_in_stacks_of_any_size(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for size in (1, 2, 5):
        assert torch.equal(torch.cat([orthogonalize(part) for part in stack.split(size)]), orthogonalize(stack)), size


@pytest.mark.parametrize("shape", [(6, 16, 32), (5, 33, 7)], ids=str)
def test_products_of_stacks_are_those_of_matrices(shape: tuple[int, int, int]) -> None:
    """They are taken on GPUs."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(newton_schulz._iterate(stack, torch.baddbmm), orthogonalize(stack), rtol=0, atol=0.01)


@pytest.mark.gpu
def test_a_gpu_computes_what_a_cpu_does_and_its_host_does_not_wait() -> None:
    there, here = (
        {n: nn.Parameter(p.detach().to(device)) for n, p in weights(MATRICES | OTHERS).items()}
        for device in ("cuda", "cpu")
    )
    optimizers = muon_of(there), muon_of(here)
    for _ in train(optimizers[1], here):
        for name, parameter in here.items():
            there[name].grad = None if parameter.grad is None else parameter.grad.cuda()
        for mine, theirs in zip(optimizers[0].param_groups, optimizers[1].param_groups, strict=True):
            mine["lr"] = theirs["lr"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizers[0].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, parameter in here.items():
        torch.testing.assert_close(there[name].cpu(), parameter, rtol=0, atol=1e-3)


class _ReadByHost(TorchDispatchMode):
    """Counts values of tensors that the host reads."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_no_value() -> None:
    parameters = weights(MATRICES)
    optimizer = muon_of(parameters)
    with _ReadByHost() as read:
        for _ in train(optimizer, parameters, steps=2):
            pass
        assert read.count == 0
        torch.ones(()).item()
    assert read.count == 1


def test_flops_are_those_of_its_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((16, 24), (24, 16)):
        with FlopCounterMode(display=False) as counted:
            orthogonalize(torch.ones(shape, dtype=torch.bfloat16))
        assert counted.get_total_flops() == orthogonalization_flops(*shape)


def test_equals_torchs_muon() -> None:
    """Bit for bit; torch's takes no stacks."""
    mine = weights(MATRICES)
    theirs = {name: [nn.Parameter(matrix.detach().clone()) for matrix in _matrices(p)] for name, p in mine.items()}
    ours = muon_of(mine)
    reference = torch.optim.Muon(
        [p for matrices in theirs.values() for p in matrices],
        lr=1.0,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in train(ours, mine):
        for name, matrices in theirs.items():
            gradient = mine[name].grad
            for index, matrix in enumerate(matrices):
                matrix.grad = None if gradient is None else _matrices(gradient)[index]
        reference.param_groups[0]["lr"] = 1e-2 * (step + 1)
        reference.step()
        for name, matrices in theirs.items():
            momenta = _matrices(ours.state[mine[name]]["momentum_buffer"])
            for index, matrix in enumerate(matrices):
                assert torch.equal(_matrices(mine[name])[index], matrix), name
                assert torch.equal(momenta[index], reference.state[matrix]["momentum_buffer"]), name


def _matrices(tensor: Tensor) -> Tensor:
    return tensor.view(-1, *tensor.shape[-2:])


def test_all_others_are_updated_by_adamw() -> None:
    mine, theirs = weights(MATRICES | OTHERS), weights(MATRICES | OTHERS)
    others = [theirs[name] for name in OTHERS]
    reference = ShardAdamW([{"params": others, "weight_decay": 0.0}], lr=1.0, betas=BETAS, eps=EPS, fused=True)
    for _ in zip(train(muon_of(mine), mine), train(reference, theirs), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in OTHERS)


def test_a_closure_is_called_once_and_before_all_updates() -> None:
    parameters = weights(MATRICES | OTHERS)
    optimizer, before = muon_of(parameters), weights(MATRICES | OTHERS)
    called: list[bool] = []

    def closure() -> str:
        called.append(all(torch.equal(parameters[name], weight) for name, weight in before.items()))
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert called == [True]
    assert not any(torch.equal(parameters[name], weight) for name, weight in before.items())


def test_stacks_are_updated_some_matrices_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits, in the memory of few."""
    together, apart = ({"experts": nn.Parameter(torch.ones(64, 16, 24).normal_())} for _ in range(2))
    apart["experts"].data.copy_(together["experts"].detach())
    peaks = []
    for parameters, elements in ((together, 2**20), (apart, 4 * 16 * 24)):
        monkeypatch.setattr(muon, "ELEMENTS_AT_ONCE", elements)
        parameter, optimizer = parameters["experts"], muon_of(parameters)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates the state
        parameter.grad = parameter.detach().sin()
        with PeakMemory([parameter, parameter.grad, optimizer.state[parameter]["momentum_buffer"]]) as memory:
            optimizer.step()
        peaks.append(memory.peak)
    assert torch.equal(together["experts"], apart["experts"])
    assert peaks[1] <= 8 * 4 * 16 * 24 < peaks[0] / 8


def test_state_dict_restores_every_bit() -> None:
    mine, copy = weights(MATRICES | OTHERS), weights(MATRICES | OTHERS)
    ours, restored = muon_of(mine), muon_of(copy)
    steps = train(ours, mine)
    for _ in range(2):
        next(steps)
    go_on_together(steps, ours, mine, restored, copy)
    assert all(torch.equal(copy[name], parameter) for name, parameter in mine.items())


# ------------------------------------------------------------------------------------------------------------- groups


def test_matrices_are_all_weights_but_embeddings_head_and_what_has_a_side_of_1() -> None:
    model = MoETransformer(tiny_config())
    optimizer = build_muon(model, MuonConfig(lr=0.3, momentum=0.8, betas=[0.7, 0.9], eps=1e-6, weight_decay=0.2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [({names[p] for p in group["params"]}, group) for group in optimizer.param_groups]
    (matrices, of_matrices), (rest, of_rest), (plain, of_plain) = found
    assert matrices | rest | plain == set(names.values())
    assert rest == {"lm_head.weight"}
    assert "embed_tokens.weight" in plain
    assert {"layers.1.ffn.router.gate.weight", "layers.1.ffn.experts.down_proj"} <= matrices
    assert all(parameter.dim() > 1 for parameter in of_matrices["params"])
    assert (of_matrices["momentum"], of_matrices["weight_decay"], of_matrices["lr"]) == (0.8, 0.2, 0.3)
    assert (of_rest["weight_decay"], of_plain["weight_decay"], of_plain["eps"]) == (0.2, 0.0, 1e-6)
    assert of_plain["betas"] == (0.7, 0.9)


# ------------------------------------------------------------------------------------------------------------- meshes


def final_state(shape: tuple[int, ...], placements: dict[str, Placements]) -> dict[str, list[Tensor]]:
    """Whole parameters and their momentum after some steps."""
    parameters = weights(MATRICES | OTHERS)
    if placements:
        mesh = init_device_mesh("cpu", shape)
        for name, parameter in parameters.items():
            parameters[name] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements[name]))
    optimizer = muon_of(parameters)
    list(train(optimizer, parameters))
    found = {name: [p.detach(), *map(optimizer.state[p].get, ("momentum_buffer",))] for name, p in parameters.items()}
    return {
        name: [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors if t is not None]
        for name, tensors in found.items()
    }


ROWS: dict[str, Placements] = {name: [Shard(0)] for name in MATRICES | OTHERS}
COPIED: dict[str, Placements] = {name: [Replicate(), Shard(0)] for name in MATRICES | OTHERS}
MESHES: list[tuple[tuple[int, ...], dict[str, Placements]]] = [
    ((2,), ROWS),  # five matrices by two ranks, 7 and 33 rows unevenly
    ((4,), ROWS | {"experts": [Shard(1)]}),  # 6 rows of experts by four ranks: the last has none, nor of 3
    ((2, 2), COPIED | {"experts": [Shard(0), Shard(1)]}),
    ((2, 2), COPIED | {"experts": [Replicate(), Shard(1)]}),
    ((4, 1), COPIED),
]


@pytest.mark.parametrize(("shape", "placements"), MESHES, ids=["2", "4", "experts-2x2", "copies-2x2", "copies-4"])
def test_every_mesh_computes_the_same_bits(shape: tuple[int, ...], placements: dict[str, Placements]) -> None:
    expected = final_state((), {})
    assert all(len(expected[name]) == 2 for name in MATRICES)
    for found in run_distributed(final_state, torch.Size(shape).numel(), shape, placements):
        for name, tensors in expected.items():
            assert all(map(torch.equal, found[name], tensors)), name


def peak_of_a_step(shape: tuple[int, int]) -> float:
    """The most bytes that a step has beside state and gradients, for each element of one of its equal matrices."""
    mesh = init_device_mesh("cpu", (2,))
    drawn = torch.ones(shape).normal_()
    parameters = {f"{i}": nn.Parameter(distribute_tensor(drawn, mesh, [Shard(0)])) for i in range(10)}
    group = {"params": list(parameters.values()), "weight_decay": 0.1, "momentum": 0.95}
    optimizer = Muon([group], 0.1, BETAS, EPS)
    for parameter in parameters.values():
        parameter.grad = distribute_tensor(drawn, mesh, [Shard(0)])
    optimizer.step()  # allocates the state
    held = [t for p in parameters.values() for t in (p, p.grad, optimizer.state[p]["momentum_buffer"]) if t is not None]
    with PeakMemory([tensor.to_local() for tensor in held]) as memory:
        optimizer.step()
    return memory.peak / torch.Size(shape).numel()


@pytest.mark.parametrize("shape", [(128, 128), (64, 256)], ids=str)
def test_a_step_has_few_matrices_at_a_time(shape: tuple[int, int]) -> None:
    """Five exchanges, of which three are under way."""
    assert max(run_distributed(peak_of_a_step, 2, shape)) <= 16


def order_of_work() -> list[str]:
    """What this rank starts, waits for and computes in a step."""
    work: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            work.append(name)
            return function(*args)

        return call

    for name in ("start_all_to_all", "wait_for", "orthogonalize"):
        setattr(muon, name, noted(name, getattr(muon, name)))
    parameters = {name: p for name, p in weights(MATRICES).items() if p.dim() == 2}
    mesh = init_device_mesh("cpu", (2,))
    parameters = {n: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for n, p in parameters.items()}
    list(train(muon_of(parameters), parameters, steps=1))
    return work


def test_rows_are_on_their_way_while_others_are_orthogonalized() -> None:
    """Five matrices are three exchanges; the second rank has none of the last."""
    send, wait, compute = "start_all_to_all", "wait_for", "orthogonalize"
    middle = [send, wait, compute, send]  # the next rows go; these come, are computed, and return
    expected = [send, *middle, *middle, wait, *middle[1:], wait, wait]
    first, second = run_distributed(order_of_work, 2)
    assert first == expected
    last = len(expected) - 1 - expected[::-1].index(compute)
    assert second == [*expected[:last], *expected[last + 1 :]]
