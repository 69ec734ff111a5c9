"""Parameters and shards that plans read off a recipe, beside those of the model that training builds."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from moefoundry.config import AttentionConfig, ConfigError, ModelConfig, Recipe, load_recipe
from moefoundry.mesh import resolve_degrees
from moefoundry.model.attention import Attention
from moefoundry.moe.dealing import dealt_once
from moefoundry.planning.outline import Outline
from moefoundry.planning.plan import make_plan
from moefoundry.planning.weights import Weight, module_names, named_weights
from moefoundry.registry import Part
from tests.conftest import QUICKSTART
from tests.planning.sharded import built, linear_weights, units_of

ROOT = Path(__file__).parents[2]
TWINS = sorted((ROOT / "configs/pretrain/tiny").glob("*.yaml"))
ALL = "lora={rank: 8, dora: true, train_router: true}"
ADAPTED = {
    "all": ("deepseek-v3-671b", ALL),
    "linear": ("qwen3-next-80b-a3b", "lora={targets: [attention, experts.up_proj]}"),
    "biases": ("gpt-oss-20b", "lora={targets: [attention.o_proj, experts]}"),
    "gated": ("qwen1.5-moe-14b", "lora={targets: [shared_experts.up_proj, experts], dora: true}"),
}
CASES = [pytest.param(path.stem, (), id=path.stem) for path in TWINS]
CASES += [pytest.param(twin, (lora, "load_path=base"), id=name) for name, (twin, lora) in ADAPTED.items()]


def twin(name: str, *overrides: str, world_size: int = 1) -> Recipe:
    return load_recipe(str(ROOT / f"configs/pretrain/tiny/{name}.yaml"), list(overrides), world_size=world_size)


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_they_are_those_of_the_modules(name: str, overrides: tuple[str, ...]) -> None:
    recipe = twin(name, *overrides)
    model, found = built(recipe), dict(named_weights(recipe.model, recipe.lora))
    linear = linear_weights(model)
    assert {key: (weight.shape, weight.trained) for key, weight in found.items()} == {
        key: (tuple(parameter.shape), parameter.requires_grad) for key, parameter in model.named_parameters()
    }
    assert {key for key, weight in found.items() if weight.linear} == linear & found.keys()
    if recipe.lora is None:
        assert module_names(recipe.model) == dict(model.named_modules()).keys()
    counts = Outline(recipe).counts
    assert counts.total + counts.mtp == sum(parameter.numel() for parameter in model.parameters())


MESHES = [(1, 1, 1), (1, 2, 1), (1, 4, 4), (2, 4, 2), (1, 64, 2), (3, 16, 8)]
PRECISIONS = ["fp32", "bf16"]


def spread(cases: list) -> list:
    """All of these; every third model runs once in the everyday set, and the rest is slow."""
    fast = {(path.stem, MESHES[i % len(MESHES)], PRECISIONS[i // 2 % 2]) for i, path in enumerate(TWINS[::3])}
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("name", "mesh", "compute"), spread([*product([path.stem for path in TWINS], MESHES, PRECISIONS)])
)
def test_shards_are_those_of_fsdp(name: str, mesh: tuple[int, int, int], compute: str) -> None:
    check_units(name, mesh, f"precision={{compute: {compute}}}")


@pytest.mark.parametrize(("name", "lora"), ADAPTED.values(), ids=ADAPTED.keys())
def test_shards_of_adapters_are_those_of_fsdp(name: str, lora: str) -> None:
    check_units(name, (2, 2, 2), "precision={compute: bf16}", lora, "load_path=base")


def check_units(name: str, mesh: tuple[int, int, int], *overrides: str) -> None:
    replicate, shard, expert = mesh
    experts = twin(name).model.moe.num_experts
    while experts % expert:
        expert //= 2
    world = replicate * shard
    degrees = f"mesh={{replicate: {replicate}, shard: {shard}, expert: {expert}}}"
    recipe = twin(name, degrees, f"global_train_batch_size={world}", *overrides, world_size=world)
    assert Outline(recipe).shard(recipe, resolve_degrees(recipe.mesh, world)).units == units_of(recipe, world)


def test_experts_are_dealt_in_the_order_that_torch_shuffles() -> None:
    draw = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(96, generator=draw).tolist()
    assert [expert for token in dealt_once(8, 96, 1, 1) for expert in token] == shuffled


def test_targets_that_the_model_lacks_are_named() -> None:
    recipe = twin("olmoe-1b-7b", "lora={targets: [attention.qq_proj]}", "load_path=base")
    with pytest.raises(ConfigError, match=r"lora.targets\[0\].*attention.qq_proj.*attention.q_proj"):
        make_plan(recipe, 1)


class Narrow(Attention):
    """An attention of another package, with one weight."""

    def __init__(self, cfg: AttentionConfig, model: ModelConfig) -> None:
        super().__init__()
        self.o_proj = nn.Linear(model.d_model, model.d_model, bias=False)
        self.shift = nn.Parameter(torch.empty(3))


def test_an_attention_kind_of_another_package_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.config.parts import TABLES

    monkeypatch.setitem(TABLES["attention_kinds"]._made, "narrow", Part(AttentionConfig, Narrow))
    recipe = load_recipe(QUICKSTART, [])
    recipe.model.attention = AttentionConfig(kind="narrow", n_heads=4)
    found = dict(named_weights(recipe.model))
    width = recipe.model.d_model
    assert found["layers.0.attention.o_proj.weight"] == Weight("attention.o_proj.weight", (width, width), linear=True)
    assert found["layers.0.attention.shift"].shape == (3,)
