"""A step of 64 ranks, taken in one process: FSDP's and the dispatcher's collectives are those that ``plan`` counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moefoundry.config import Recipe, load_recipe
from moefoundry.config.making import make_part
from moefoundry.mesh import Meshes, build_meshes, resolve_degrees
from moefoundry.model.transformer import MoETransformer
from moefoundry.parallel import materialize, parallelize
from moefoundry.planning.plan import make_plan
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed
from tests.model.tiny import meta_model
from tests.planning.counting import SentBytes
from tests.planning.sharded import fake_world
from tests.symmetric_world import SymmetricWorld

WORLD, GPUS_PER_NODE, SEQUENCE = 64, 8, 32
MODEL = [
    *(f"max_seq_len={SEQUENCE}", "model.vocab_size=67", "model.d_model=64", "model.ffn_hidden_size=96"),
    "model.attention={n_heads: 4, n_kv_heads: 2}",
    *("model.moe.num_experts=64", "model.moe.top_k=6", "model.moe.expert_hidden_size=16"),
    "model.moe.router.assignment=uniform",
    *(f"global_train_batch_size={WORLD}", "device_train_microbatch_size=1"),
]
CASES = {
    "copies": ["mesh={replicate: 2, shard: 32, expert: 8}"],
    "two hops": ["mesh={shard: 64, expert: 32, ranks_per_node: 8}", "activation_checkpointing=full"],
    "FP8": ["mesh={shard: 64, expert: 8}", "precision={compute: bf16, fp8: {recipe: deepseek_v3}}"],
    "parts of experts by Muon": ["mesh={shard: 64, expert: 8}", "model.moe.num_experts=32", "optimizer.name=muon"],
}

Sent = dict[tuple[str, str], tuple[int, int]]


@contextmanager
def sharded(recipe: Recipe) -> Iterator[tuple[MoETransformer, Meshes]]:
    """The model of a recipe on the first of all ranks, whose others do as it does."""
    with fake_world(WORLD), SymmetricWorld():
        meshes = build_meshes(resolve_degrees(recipe.mesh, WORLD, GPUS_PER_NODE), "cpu")
        model = meta_model(recipe.model)
        parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
        materialize(model, "cpu", 0)
        yield model, meshes


def step(recipe: Recipe) -> tuple[Sent, int, list[str]]:
    """Calls and bytes of a step; all-reduces of the gradient norm; parameters that the step did not change."""
    from moefoundry.callbacks.health import global_norm

    with sharded(recipe) as (model, meshes):
        optimizer = make_part("optimizers", recipe.optimizer.name, "optimizer", recipe.optimizer, model, recipe)
        ids = torch.arange(SEQUENCE).unsqueeze(0)  # rank 0 has the first rows of the embedding
        with SentBytes(meshes) as counted:
            loss = model(ids, ids).total
            loss.backward()
        assert loss.isfinite()
        with SentBytes(meshes) as of_norm:
            norm = global_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert norm.isfinite()
        before = {name: p.to_local().clone() for name, p in model.named_parameters()}
        with SentBytes(meshes, of_optimizer=True) as of_update:
            optimizer.step()
        still = [name for name, p in model.named_parameters() if torch.equal(p.to_local(), before[name])]
    calls, sizes = counted.calls + of_update.calls, counted.sent + of_update.sent
    sent = {key: (number, sizes[key]) for key, number in calls.items()}
    return sent, of_norm.calls.total(), [name for name in still if before[name].numel()]


def recipe_of(case: list[str], layers: int) -> Recipe:
    return load_recipe(QUICKSTART, [*MODEL, f"model.n_layers={layers}", *case], WORLD)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_of_64_ranks_sends_what_is_planned_and_so_does_each_layer(case: list[str]) -> None:
    sent = []
    for layers in (2, 3):
        recipe = recipe_of(case, layers)
        [(of_step, reductions, unchanged)] = run_distributed(step, 1, recipe)
        planned = make_plan(recipe, WORLD, GPUS_PER_NODE).traffic
        assert {(entry.collective, entry.axis): (entry.calls, entry.sent) for entry in planned} == of_step
        assert reductions == 3, "the norm is summed over shard for dense parameters, and over both axes of experts"
        assert not unchanged
        sent.append(of_step)
    for key, of_three in sent[1].items():  # few matrices are exchanged at once
        assert of_three > sent[0][key] or key[0] == "all_reduce", f"{key} is not of a layer"
