"""Matrices that Muon updates, in plans and in models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moefoundry.config import Recipe, load_recipe
from moefoundry.mesh import EXPERT_SHARD, SHARD, MeshDegrees, build_meshes, resolve_degrees
from moefoundry.muon import build_muon
from moefoundry.ops.matrices import is_matrix, orthogonalization_flops
from moefoundry.optim import by_decay
from moefoundry.parallel import parallelize
from moefoundry.planning.choose import choose
from moefoundry.planning.devices import accelerator
from moefoundry.planning.estimate import estimate
from moefoundry.planning.matrices import Exchanges, matrices_of
from moefoundry.planning.outline import Outline
from moefoundry.planning.plan import make_plan
from moefoundry.planning.weights import Weight
from tests.conftest import QUICKSTART
from tests.planning.sharded import built, fake_world
from tests.planning.test_weights import TWINS, twin

MUON, FP32 = "optimizer.name=muon", "precision.optimizer_moments=fp32"
H100 = accelerator("h100")
MESHES = [(1, 1, 1), (1, 4, 4), (1, 64, 2), (3, 16, 8), (2, 64, 4)]
"""On 64 ranks most rows are uneven, and ranks share parts of experts."""


def on_mesh(name: str, mesh: tuple[int, int, int], *overrides: str) -> Recipe:
    replicate, shard, expert = mesh
    while twin(name).model.moe.num_experts % expert:
        expert //= 2
    world = replicate * shard
    degrees = f"mesh={{replicate: {replicate}, shard: {shard}, expert: {expert}}}"
    return twin(name, degrees, f"global_train_batch_size={world}", MUON, FP32, *overrides, world_size=world)


def held(recipe: Recipe) -> tuple[int, int]:
    """Elements of matrices and of all other parameters that train, on rank 0 of the recipe's world."""
    world = recipe.mesh.replicate * recipe.mesh.shard
    model = built(recipe)
    with fake_world(world):
        meshes = build_meshes(resolve_degrees(recipe.mesh, world, 8), "cpu") if world > 1 else None
        parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
        decayed, plain = by_decay(model)
        sizes = {name: local(p).numel() for name, p in (decayed | plain).items()}
        matrices = {name for name, p in decayed.items() if is_matrix(name, p.shape)}
    return sum(sizes[name] for name in matrices), sum(size for name, size in sizes.items() if name not in matrices)


def local(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(path.stem, MESHES[i % len(MESHES)], id=f"{path.stem}-{MESHES[i % len(MESHES)]}")
        for i, path in enumerate(TWINS)
    ],
)
def test_state_is_4_bytes_an_element_of_matrices_and_8_of_others(name: str, mesh: tuple[int, int, int]) -> None:
    recipe = on_mesh(name, mesh)
    matrices, others = held(recipe)
    assert make_plan(recipe, recipe.mesh.replicate * recipe.mesh.shard).memory.optimizer == 4 * matrices + 8 * others


def test_state_of_adapters() -> None:
    recipe = on_mesh("olmoe-1b-7b", (1, 4, 2), "lora={rank: 8, dora: true, train_router: true}", "load_path=base")
    matrices, others = held(recipe)
    assert others > 0
    assert make_plan(recipe, 4).memory.optimizer == 4 * matrices + 8 * others


def test_exchanges_by_hand() -> None:
    """Five matrices [6, 10] and one [20, 10] on four ranks, whose first has 2 rows of the one and 5 of the other."""
    weights = [
        (Weight("a.weight", (6, 10)), 5),
        (Weight("b.weight", (20, 10)), 1),
        (Weight("lm_head.weight", (8, 8)), 1),
    ]
    found = matrices_of(weights, MeshDegrees(1, 4, 1))
    assert found.owned == 5 * 2 * 10 + 5 * 10
    assert found.flops == 0
    own = orthogonalization_flops(20, 10) + orthogonalization_flops(6, 10)
    there, back = 4 * 2 * 10, (20 - 5) * 10 + (6 - 2) * 10  # of four others; of the largest and the fifth
    assert found.exchanges == [Exchanges(SHARD, 2, 2 * (there + back), own)]


def test_parts_of_experts_are_exchanged_and_whole_ones_are_not() -> None:
    weights = [(Weight("ffn.experts.up_proj", (8, 16, 10)), 3)]
    parts, whole = (
        matrices_of(weights, MeshDegrees(1, shard, 4)) for shard in (16, 8)
    )  # of 2 experts on 4 and 2 ranks
    (exchange,) = parts.exchanges
    assert (exchange.axis, exchange.number, parts.flops, parts.owned) == (EXPERT_SHARD, 2, 0, 6 * 4 * 10)
    assert (whole.exchanges, whole.flops, whole.owned) == ([], 3 * orthogonalization_flops(16, 10), 3 * 160)


def test_an_estimate_has_the_time_of_products_and_rows_but_not_among_tokens() -> None:
    keys = ["mesh={shard: 64, expert: 8}", "model.d_model=1024", "global_train_batch_size=64"]
    adamw, muon = (estimate(load_recipe(QUICKSTART, [*keys, *more], 64), 64, H100) for more in ([], [MUON]))
    assert muon.step.exchange == adamw.step.exchange > 0
    assert muon.step.sharding == adamw.step.sharding
    assert muon.plan.memory.optimizer < adamw.plan.memory.optimizer
    recipe = load_recipe(QUICKSTART, [*keys, MUON], 64)
    matrices = Outline(recipe).shard(recipe, muon.plan.mesh).matrices
    flops = matrices.flops + sum(each.flops for each in matrices.exchanges)
    assert muon.step.optimizer > flops / (H100.bf16_tflops * 1e12)


def test_the_page_has_the_time_of_an_estimate() -> None:
    recipe = load_recipe(QUICKSTART.parent / "pretrain/moonlight-16b-a3b.yaml", [], 128)
    step = estimate(recipe, 128, H100).step
    words = f"for Moonlight on 128 H100, {step.optimizer:.2f} of {step.total:.1f} seconds"
    assert words in (QUICKSTART.parents[1] / "docs/training.md").read_text()


def test_recommend_finds_a_mesh_for_muon_and_tries_no_narrow_moments() -> None:
    recipe = load_recipe(str(QUICKSTART.parent / "pretrain/olmoe-1b-7b.yaml"), [MUON])
    choice = choose(recipe, 8, H100, 1, chunks=())
    assert choice.best
    assert not any("precision.optimizer_moments" in each.changes for each in choice.best)
    small = accelerator("h100")
    nothing = choose(recipe, 1, small, 1, chunks=())
    assert nothing.least is not None
    assert "precision.optimizer_moments" not in nothing.least.changes


def test_the_optimizer_takes_what_is_planned() -> None:
    model = built(load_recipe(QUICKSTART, ["model.d_model=64", "model.vocab_size=67"])).to_empty(device="cpu")
    found = {
        p
        for group in build_muon(model, load_recipe(QUICKSTART, [MUON]).optimizer).param_groups
        if "momentum" in group
        for p in group["params"]
    }
    planned = {name for name, p in model.named_parameters() if is_matrix(name, p.shape)}
    assert {name for name, p in model.named_parameters() if p in found} == planned
