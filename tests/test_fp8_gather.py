"""Weights that FSDP gathers in FP8: the bits of gathering them in BF16, in half of the bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moefoundry.callbacks.ema import ParameterAverage
from moefoundry.config import ActivationCheckpointing, Compute, Fp8Config, Fp8Recipe, MeshConfig, PrecisionConfig
from moefoundry.mesh import build_meshes, resolve_degrees
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.ops.fp8 import GatheredBlocks
from moefoundry.parallel import materialize, parallelize
from tests.distributed import run_distributed
from tests.model.tiny import batch, tiny_config
from tests.test_fp8_weights import Doubling, changed_by_load, counted, train

DENSE = "layers.0.attention.q_proj", "layers.0.attention.o_proj", "layers.0.ffn", "layers.1.ffn.shared_experts"
EXPERTS = "layers.1.ffn.experts"
WIDTH = 256


class Case(NamedTuple):
    mesh: MeshConfig
    ranks: int
    mode: str = "none"
    compute: Compute = Compute.bf16
    transposed: bool = False
    chunks: int = 1
    gathers: bool = True


def build(case: Case) -> MoETransformer:
    cfg = tiny_config(n_layers=2)
    cfg.d_model = cfg.ffn_hidden_size = cfg.moe.expert_hidden_size = WIDTH
    cfg.moe.dispatch_chunks = case.chunks
    meshes = build_meshes(resolve_degrees(case.mesh, case.ranks), "cpu")
    model = meta_model(cfg)
    precision = PrecisionConfig(case.compute, fp8=Fp8Config(Fp8Recipe.deepseek_v3, fsdp_all_gather=case.gathers))
    parallelize(model, meshes, precision, ActivationCheckpointing(case.mode))
    materialize(model, "cpu", 0)
    return model


def gathered(model: MoETransformer) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(getattr(module, "blocks", None), GatheredBlocks)
    }


def step(case: Case) -> tuple[dict[str, Tensor], Counter[str], set[str]]:
    model = build(case)
    with counted(case.transposed) as counts:
        found = train(model)
    return found, counts, gathered(model)


def both_ways(case: Case) -> tuple[Counter[str], Counter[str], set[str]]:
    ours, counts, modules = step(case)
    expected, others, none = step(case._replace(gathers=False))
    assert not none
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name
    return counts, others, modules


CASES = {
    "two": Case(MeshConfig(1, 2, 1), 2, transposed=True),
    "experts": Case(MeshConfig(1, 4, 2), 4, mode="full", chunks=2),
    "copies": Case(MeshConfig(2, 2, 1), 4),
    "selective": Case(MeshConfig(1, 2, 1), 2, mode="selective"),
    "emulated": Case(MeshConfig(1, 2, 1), 2, compute=Compute.bf16_emulated),
    "copies of experts": Case(MeshConfig(2, 2, 2), 4, mode="selective"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in CASES.items() if name != "two"]
)
def test_losses_gradients_and_parameters_have_the_same_bits(case: Case) -> None:
    *_, modules = run_distributed(both_ways, case.ranks, case)[0]
    check_modules(case, modules)


def check_modules(case: Case, modules: set[str]) -> None:
    if case.mesh.expert < case.mesh.shard:
        assert EXPERTS in modules
    if case.mesh.shard == 2:
        assert modules >= set(DENSE)
        assert "layers.0.attention.k_proj" not in modules, "a rank has half a block"


@pytest.mark.slow
def test_a_step_quantizes_each_shard_once_with_the_same_bits() -> None:
    ours, theirs, modules = run_distributed(both_ways, 2, CASES["two"])[0]
    check_modules(CASES["two"], modules)
    whole, halves = 2 * 2 + 3 + 3 + 3, 2 * 2
    assert ours == {"quantize": 2 * whole + 3 * halves, "quantize_transposed": 2 * halves}, "and for the evaluation"
    assert theirs == {"quantize": 3 * (whole + halves), "quantize_transposed": 2 * (whole + halves)}


def through_checkpoints(path: str) -> None:
    """Save on one mesh, load on another: each tensor is a plain one, and what follows has the bits of BF16 gathers."""
    source = build(CASES["two"])
    train(source)
    state = source.state_dict()
    assert all(type(value.to_local().detach()) is Tensor for value in state.values())
    dcp.save({"model": state}, checkpoint_id=path)
    losses = []
    for gathers in (True, False):
        model = build(Case(MeshConfig(1, 2, 2), 2, gathers=gathers))
        with torch.no_grad():
            model(batch(), batch())
        loaded = {"model": model.state_dict()}
        dcp.load(loaded, checkpoint_id=path)
        model.load_state_dict(loaded["model"])
        assert bool(gathered(model)) == gathers
        for name, value in model.state_dict().items():
            assert torch.equal(value.full_tensor(), state[name].full_tensor()), name
        losses.append(train(model))
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


def test_checkpoints_hold_plain_tensors_and_load_on_another_mesh(tmp_path) -> None:
    run_distributed(through_checkpoints, 2, str(tmp_path))


@torch.no_grad()
def changed_as_the_average_does(model: MoETransformer) -> None:
    shards: list[Any] = [parameter.to_local() for parameter in model.layers.parameters()]
    ParameterAverage([2 * shard for shard in shards], 0.5).exchange(shards)


def changed_by_a_fused_step(model: MoETransformer) -> None:
    Doubling(model).step()


def after_changes() -> None:
    def loss(model: MoETransformer) -> Tensor:
        with torch.no_grad():
            return model(batch(), batch()).lm.clone()

    models = [build(CASES["two"]._replace(gathers=gathers)) for gathers in (True, False)]
    for change in (changed_by_load, changed_as_the_average_does, changed_by_a_fused_step):
        before = [loss(model) for model in models]
        for model in models:
            change(model)
        after = [loss(model) for model in models]
        assert not torch.equal(after[0], before[0]), change
        assert torch.equal(*after), change


def test_no_gather_sees_older_shards() -> None:
    run_distributed(after_changes, 2)


def experts_after_a_load() -> None:
    model = build(Case(MeshConfig(1, 2, 2), 2))
    with torch.no_grad():
        before = model(batch(), batch()).lm.clone()
        changed_by_load(model)
        after = model(batch(), batch()).lm.clone()
        keep_nothing_of_experts(model)
        assert not torch.equal(after, before)
        assert torch.equal(after, model(batch(), batch()).lm)


def keep_nothing_of_experts(model: MoETransformer) -> None:
    experts: Any = model.get_submodule(EXPERTS)
    assert experts.blocks.found
    experts.blocks = None


def test_experts_that_one_rank_has_are_quantized_anew_after_a_load() -> None:
    run_distributed(experts_after_a_load, 2)
