"""Planned traffic against steps of four ranks, byte for byte."""

from __future__ import annotations

import pytest
import torch

from moefoundry.config import Recipe, load_recipe
from moefoundry.config.making import make_part
from moefoundry.planning.plan import make_plan, micro_batches
from tests.conftest import QUICKSTART
from tests.distributed import run_distributed
from tests.model.tiny import meta_model
from tests.planning.counting import SentBytes

SEQUENCE = 24
TINY = [
    f"max_seq_len={SEQUENCE}",
    "model.vocab_size=61",
    "model.d_model=32",
    "model.n_layers=3",
    "model.ffn_hidden_size=48",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.moe.num_experts=8",
    "model.moe.top_k=3",
    "model.moe.expert_hidden_size=16",
    "model.moe.router.assignment=uniform",
    "device_train_microbatch_size=1",
]
"""Dimensions that do not divide by 4 (61 rows) and slots that do not divide by 8 experts (72 = 9 * 8 do, with
multi-token prediction 69 do not)."""


def recipe_of(mesh: tuple[int, int, int], *overrides: str, sequences: int = 1) -> Recipe:
    replicate, shard, expert = mesh
    degrees = [f"mesh.replicate={replicate}", f"mesh.shard={shard}", f"mesh.expert={expert}"]
    batch = f"global_train_batch_size={sequences * replicate * shard}"
    return load_recipe(QUICKSTART, [*TINY, *degrees, batch, *overrides], replicate * shard)


def count_steps(recipes: list[Recipe], gpus_per_node: int) -> list[dict[tuple[str, str], tuple[int, int]]]:
    """Calls and bytes on this rank of a step of each recipe."""
    import torch.distributed as dist

    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.parallel import begin_micro_batch, materialize, parallelize

    counts = []
    for recipe in recipes:
        meshes = build_meshes(resolve_degrees(recipe.mesh, dist.get_world_size(), gpus_per_node), "cpu")
        model = meta_model(recipe.model)
        parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
        materialize(model, "cpu", 0)
        with SentBytes(meshes) as counted:
            batches = [*micro_batches(recipe, dist.get_world_size()).elements()]
            for index, sequences in enumerate(batches, start=1):
                begin_micro_batch(model, index == len(batches))
                tokens = torch.randint(0, 61, (sequences, SEQUENCE))
                model(tokens, tokens).total.backward()
        optimizer = make_part("optimizers", recipe.optimizer.name, "optimizer", recipe.optimizer, model, recipe)
        with SentBytes(meshes, of_optimizer=True) as of_update:
            optimizer.step()
        calls, sent = counted.calls + of_update.calls, counted.sent + of_update.sent
        counts.append({key: (number, sent[key]) for key, number in calls.items()})
    return counts


def check(recipes: list[Recipe], gpus_per_node: int = 8) -> None:
    counts = run_distributed(count_steps, 4, recipes, gpus_per_node)[0]
    for recipe, counted in zip(recipes, counts, strict=True):
        planned = make_plan(recipe, 4, gpus_per_node).traffic
        assert {(entry.collective, entry.axis): (entry.calls, entry.sent) for entry in planned} == counted


SLOW_MESHES = [(1, 4, 1), (1, 4, 2), (2, 2, 1), (4, 1, 1), (1, 4, 4)]
MESHES = [(2, 2, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW_MESHES)]
MODES = [f"activation_checkpointing={mode}" for mode in ("none", "selective", "full")]


IN_CHUNKS = "model.moe.dispatch_chunks=5"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_step_sends_what_is_planned(mesh):
    ways = ([MODES[0]], [MODES[1], IN_CHUNKS], [MODES[2]], [MODES[2], IN_CHUNKS])
    check([recipe_of(mesh, *way) for way in ways])


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 4, 2), (2, 2, 2))], ids=str
)
def test_gradients_are_scattered_after_each_micro_batch_and_summed_after_the_last_which_may_be_smaller(mesh):
    micro_batch = "device_train_microbatch_size=2"
    check([recipe_of(mesh, micro_batch, MODES[-1], sequences=sequences) for sequences in (4, 3)])


ONCE = ("mesh.gather=each_step", "mesh.reduce=each_step")


@pytest.mark.parametrize("mesh", [(1, 4, 2), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_parameters_are_gathered_and_gradients_reduced_once_a_step_if_so_wanted(mesh):
    changes = [(ONCE[0],), (ONCE[1],), (*ONCE, MODES[-1])]
    check([recipe_of(mesh, "device_train_microbatch_size=2", *change, sequences=6) for change in changes])


@pytest.mark.slow
def test_multi_token_prediction_and_a_balance_loss_over_all_ranks():
    further = ["model.mtp.depth=2", "model.moe.balance.aux_loss_scope=global_batch"]
    check([recipe_of((2, 2, 2), mode, *further) for mode in (MODES[0], MODES[-1])])


def test_experts_on_several_nodes_are_reached_in_two_hops():
    ways = ([MODES[0]], [MODES[1]], [MODES[2], IN_CHUNKS])
    check([recipe_of((1, 4, 4), *way) for way in ways], gpus_per_node=2)


def test_tokens_of_limited_groups_reach_fewer_nodes_and_ranks():
    """Four groups are the ranks, two are the nodes."""
    free = recipe_of((1, 4, 4), MODES[-1])
    two_of_four, one_of_two = (
        recipe_of((1, 4, 4), MODES[-1], f"model.moe.router={{assignment: uniform, {groups}}}")
        for groups in ("num_groups: 4, top_k_groups: 2", "num_groups: 2, top_k_groups: 1")
    )
    check([two_of_four, one_of_two], gpus_per_node=2)
    sent = [
        {entry.axis: entry.sent for entry in make_plan(recipe, 4, 2).traffic if entry.collective == "all_to_all"}
        for recipe in (free, two_of_four, one_of_two)
    ]
    assert sent[0]["expert_node"] > sent[1]["expert_node"] > sent[2]["expert_node"]
    assert sent[0]["expert_place"] > max(sent[1]["expert_place"], sent[2]["expert_place"])


def test_bf16_halves_what_is_gathered_and_exchanged_but_not_what_is_reduced():
    narrow, wide = (recipe_of((1, 4, 2), f"precision.compute={compute}") for compute in ("bf16", "fp32"))
    check([narrow])
    narrow_sent, wide_sent = (
        {(entry.collective, entry.axis): entry.sent for entry in make_plan(recipe, 4).traffic}
        for recipe in (narrow, wide)
    )
    assert narrow_sent["all_gather", "expert_shard"] * 2 == wide_sent["all_gather", "expert_shard"]
    assert narrow_sent["reduce_scatter", "expert_shard"] == wide_sent["reduce_scatter", "expert_shard"]


FP8 = "precision={compute: bf16, fp8: {recipe: deepseek_v3}}"
GATHERED = "precision={compute: bf16, fp8: {recipe: deepseek_v3, fsdp_all_gather: true}}"


@pytest.mark.slow
def test_fp8_narrows_the_two_legs_that_spread_rows():
    check([recipe_of((1, 4, 4), mode, FP8) for mode in MODES])
    check([recipe_of((1, 4, 4), FP8)], gpus_per_node=2)
    narrow, wide = (
        {(entry.collective, entry.axis): entry.sent for entry in make_plan(recipe, 4).traffic}
        for recipe in (recipe_of((1, 4, 4), change) for change in (FP8, "precision.compute=bf16"))
    )
    assert {key for key, sent in wide.items() if narrow[key] != sent} == {("all_to_all", "expert")}
    assert narrow["all_to_all", "expert"] < wide["all_to_all", "expert"]


@pytest.mark.slow
def test_weights_of_fp8_products_are_gathered_in_half_of_the_bytes():
    wide_ffn = "model.ffn_hidden_size=512"  # gate and up have a block for each rank, down has not
    check([recipe_of((1, 4, 2), GATHERED, wide_ffn), recipe_of((1, 4, 2), GATHERED, MODES[-1])])
    narrow, wide = (
        {(entry.collective, entry.axis): entry.sent for entry in make_plan(recipe, 4).traffic}
        for recipe in (recipe_of((1, 4, 2), wide_ffn, change) for change in (GATHERED, "precision.compute=bf16"))
    )
    scales = 2 * 2 * 3 * 2  # both gathers of two layers, three weights of two experts each with one block
    assert narrow["all_gather", "expert_shard"] == wide["all_gather", "expert_shard"] // 2 + scales
    assert narrow["all_gather", "shard"] < wide["all_gather", "shard"]


MUON, FEW_EXPERTS = "optimizer.name=muon", "model.moe={num_experts: 2, top_k: 2}"
SLOW_OF_MUON = [((1, 4, 1), "shard"), ((2, 2, 2), "shard"), ((1, 4, 4), "shard"), ((4, 1, 1), "")]


@pytest.mark.parametrize(
    ("mesh", "axis"),
    [((1, 4, 2), "shard"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_OF_MUON)],
    ids=str,
)
def test_muon_exchanges_rows_of_matrices_once_a_step(mesh, axis):
    recipe = recipe_of(mesh, MUON, "model.mtp.depth=1", sequences=2)
    check([recipe])
    traffic = make_plan(recipe, 4).traffic
    assert {entry.axis for entry in traffic if entry.collective == "all_to_all"} - {"expert"} == {axis} - {""}


def test_muon_exchanges_parts_of_experts_that_are_fewer_than_the_ranks_that_share_them():
    recipe = recipe_of((1, 4, 2), MUON, FEW_EXPERTS)
    check([recipe])
    assert ("all_to_all", "expert_shard") in {(entry.collective, entry.axis) for entry in make_plan(recipe, 4).traffic}


def count_trainer_step(recipe: Recipe) -> dict[tuple[str, str], tuple[int, int]]:
    """As :func:`count_steps`, through Composer's own loop."""
    from moefoundry import build as parts

    meshes = []
    setup = parts.setup_meshes
    parts.setup_meshes = lambda *args: meshes.append(setup(*args)) or meshes[0]
    trainer = parts.build_trainer(recipe)
    with SentBytes(meshes[0], strict=False) as counted:
        trainer.fit()
    trainer.close()
    return {key: (counted.calls[key], sent) for key, sent in counted.sent.items()}


@pytest.mark.slow
def test_the_trainer_sends_it_too(tiny_recipe, tmp_path):
    mesh = ["mesh.replicate=2", "mesh.shard=2", "mesh.expert=2", "model.moe.router.assignment=uniform"]
    one_batch = ["max_duration=1ba", "scheduler.t_warmup=0ba", "eval_loader=null", "device_train_microbatch_size=1"]
    recipe = tiny_recipe(tmp_path, *mesh, *one_batch)
    counted = run_distributed(count_trainer_step, 4, recipe)[0]
    planned = {(entry.collective, entry.axis): (entry.calls, entry.sent) for entry in make_plan(recipe, 4).traffic}
    assert planned.items() <= counted.items()
    assert {collective for collective, _ in counted.keys() - planned.keys()} == {"all_reduce"}  # metrics


def test_what_crosses_nodes():
    entries = {(entry.collective, entry.axis): entry for entry in make_plan(recipe_of((1, 4, 4)), 4, 3).traffic}
    exchange = entries["all_to_all", "expert"]
    assert exchange.across_nodes == exchange.sent  # rank 3 is alone on the second node
    assert all(entry.across_nodes == 0 for entry in make_plan(recipe_of((1, 4, 2)), 4, 4).traffic)
    pairs = {(entry.collective, entry.axis): entry for entry in make_plan(recipe_of((1, 4, 2)), 4, 2).traffic}
    assert pairs["all_to_all", "expert"].across_nodes == 0
    assert pairs["all_gather", "expert_shard"].across_nodes == pairs["all_gather", "expert_shard"].sent
    assert pairs["all_gather", "shard"].across_nodes == pairs["all_gather", "shard"].sent * 2 // 3
