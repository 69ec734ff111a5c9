"""A plan's shards against closed forms that know nothing of torch, and its activations against what is alive."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from itertools import product
from math import prod

import pytest
import torch

from moefoundry.config import (
    ActivationCheckpointing,
    ConfigError,
    EmaConfig,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    Moments,
    load_recipe,
)
from moefoundry.mesh import MeshDegrees
from moefoundry.parallel import materialize, parallelize
from moefoundry.planning.activations import block_activations
from moefoundry.planning.plan import make_plan, micro_batches
from moefoundry.planning.table import plan_table
from moefoundry.planning.world import Groups, groups_by_axis, most_remote_peers
from moefoundry.precision import Fp8Experts, Fp8Linear, apply_precision
from tests.conftest import QUICKSTART
from tests.memory import PeakMemory
from tests.model.tiny import batch, meta_model

ODD = [
    "model.vocab_size=1237",
    "model.d_model=72",
    "model.n_layers=4",
    "model.ffn_hidden_size=203",
    "model.moe.backend=loop",
    "model.moe.expert_hidden_size=44",
    "model.moe.num_experts=24",
    "max_seq_len=16",
]
GQA = "model.attention={kind: gqa, n_heads: 6, n_kv_heads: 3}"
MLA = (
    "model.attention={kind: mla, n_heads: 5, q_lora_rank: 37, kv_lora_rank: 26, "
    "qk_nope_head_dim: 6, qk_rope_head_dim: 4, v_head_dim: 7}"
)
FP8 = "precision.fp8.recipe=deepseek_v3"
VARIANTS = {
    "gqa": [GQA],
    "tied": [GQA, "model.tie_embeddings=true"],
    "bf16": [GQA, "precision.compute=bf16"],
    "mla": [MLA, "model.mtp.depth=2", "precision.compute=bf16"],
}


def weights(cfg: ModelConfig) -> Iterator[tuple[int, int, int]]:
    """Rows, elements of a row, and for an expert's the rows of one expert (else 0), for each weight: by hand, from the
    sizes of the recipe."""
    width, moe = cfg.d_model, cfg.moe

    def ffn(hidden: int) -> list[tuple[int, int, int]]:
        return [(hidden, width, 0), (hidden, width, 0), (width, hidden, 0)]

    def attention() -> list[tuple[int, int, int]]:
        a = cfg.attention
        if isinstance(a, GqaConfig):
            head = width // a.n_heads
            return [(a.n_heads * head, width, 0), *[(a.n_kv_heads * head, width, 0)] * 2, (width, width, 0)]
        assert isinstance(a, MlaConfig)
        query = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        return [
            (a.q_lora_rank, width, 0),
            (a.q_lora_rank, 1, 0),
            (query, a.q_lora_rank, 0),
            (a.kv_lora_rank + a.qk_rope_head_dim, width, 0),
            (a.kv_lora_rank, 1, 0),
            (a.n_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, 0),
            (width, a.n_heads * a.v_head_dim, 0),
        ]

    def block(sparse: bool) -> list[tuple[int, int, int]]:
        norms = [(width, 1, 0)] * 2
        if not sparse:
            return [*norms, *attention(), *ffn(cfg.ffn_hidden_size)]
        hidden = moe.expert_hidden_size
        experts = [(moe.num_experts, hidden * width, rows) for rows in (hidden, hidden, width)]
        shared = ffn(moe.num_shared_experts * moe.expert_hidden_size) if moe.num_shared_experts else []
        return [*norms, *attention(), (moe.num_experts, width, 0), *experts, *shared]

    embeddings = 1 if cfg.tie_embeddings else 2
    yield from [(cfg.vocab_size, width, 0)] * embeddings
    yield (width, 1, 0)
    for layer in range(cfg.n_layers):
        yield from block(sparse=layer >= cfg.n_dense_layers)
    for _ in range(cfg.mtp.depth):
        yield from [*block(sparse=True), *[(width, 1, 0)] * 3, (width, 2 * width, 0)]


def shards(cfg: ModelConfig, shard: int, expert: int) -> tuple[int, int]:
    """Elements that a rank stores, with padding, and the most that a rank owns."""
    owned, stored = [0] * shard, 0
    for rows, row, rows_of_expert in weights(cfg):
        ranks_together = expert if rows_of_expert else 1  # that hold rows of their own before FSDP divides them
        rows = rows // ranks_together
        ranks = shard // ranks_together
        if expert > 1 and rows_of_expert and ranks > rows and rows_of_expert % ranks == 0:  # a part of each expert
            rows, row = rows_of_expert, rows * row // rows_of_expert
        chunk = -(-rows // ranks)
        stored += chunk * row
        for rank in range(shard):
            place = rank // ranks_together
            owned[rank] += max(0, min(chunk, rows - place * chunk)) * row
    return stored, max(owned)


MESHES = [(1, 6, 1), (2, 3, 3), (1, 48, 8), (2, 24, 24), (3, 16, 2)]


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [*((variant, mesh) for variant in VARIANTS for mesh in MESHES), ("mla", (32, 64, 8)), ("gqa", (1, 2048, 1))],
    ids=str,
)
def test_shards_are_those_of_the_closed_form(variant, mesh):
    replicate, shard, expert = mesh
    world = replicate * shard
    degrees = [f"mesh.replicate={replicate}", f"mesh.shard={shard}", f"mesh.expert={expert}"]
    recipe = load_recipe(QUICKSTART, [*ODD, *VARIANTS[variant], *degrees, f"global_train_batch_size={world}"], world)
    memory = make_plan(recipe, world).memory
    stored, owned = shards(recipe.model, shard, expert)
    assert memory.parameters == memory.gradients == 4 * stored
    assert memory.optimizer == 8 * owned


def test_one_rank_holds_the_whole_model():
    recipe = load_recipe(QUICKSTART, [*ODD, GQA], 1)
    plan = make_plan(recipe, 1)
    assert plan.parameters.total == sum(rows * row for rows, row, _ in weights(recipe.model))
    assert plan.memory.parameters == 4 * plan.parameters.total
    assert plan.traffic == []


@pytest.mark.parametrize("moments", [Moments.bf16, Moments.bf16_stochastic])
def test_narrow_moments_halve_the_optimizer(moments):
    recipe = load_recipe(QUICKSTART, [*ODD, GQA, "mesh.shard=4"], 4)
    wide = make_plan(recipe, 4).memory
    recipe.precision.optimizer_moments = moments
    narrow = make_plan(recipe, 4).memory
    assert (narrow.optimizer * 2, narrow.parameters) == (wide.optimizer, wide.parameters)


def test_the_moving_average_is_in_the_memory_of_the_host():
    recipe = load_recipe(QUICKSTART, [*ODD, GQA, "mesh.shard=4"], 4)
    without = make_plan(recipe, 4)
    recipe.ema = EmaConfig()
    averaged = make_plan(recipe, 4)
    assert (without.memory.host, averaged.memory.host) == (0, averaged.memory.optimizer)  # two fp32 copies are, too
    assert averaged.memory.total == without.memory.total
    assert averaged.to_json(80)["memory"]["host"] == averaged.memory.host
    assert "host" not in plan_table(without, 80)
    assert plan_table(averaged, 80).count("host") == 1


@pytest.mark.parametrize(("sequences", "micro", "expected"), [(4, 2, [2, 2]), (5, 2, [2, 2, 1]), (1, 8, [1])])
def test_micro_batches(sequences, micro, expected):
    recipe = load_recipe(
        QUICKSTART, [f"global_train_batch_size={3 * sequences}", f"device_train_microbatch_size={micro}"], 3
    )
    assert [*micro_batches(recipe, 3).elements()] == expected


def test_the_mesh_must_fit_the_world():
    with pytest.raises(ConfigError, match=r"mesh.replicate"):
        make_plan(load_recipe(QUICKSTART, ["mesh.replicate=2", "mesh.shard=2"]), 6)


@pytest.mark.parametrize(
    ("axis", "gpus_per_node", "remote"),
    [
        ("expert", 4, 0),  # ranks 0..3, 4..7, ...
        ("expert", 3, 3),  # rank 3 of 0..3 is alone on its node
        ("expert_shard", 4, 1),  # ranks 0 and 4
        ("expert_shard", 8, 0),
        ("shard", 8, 0),
        ("shard", 4, 4),
        ("replicate", 8, 1),  # ranks 0 and 8
        ("replicate", 16, 0),
        ("world", 8, 8),
    ],
)
def test_peers_on_other_nodes(axis, gpus_per_node, remote):
    groups = groups_by_axis(MeshDegrees(replicate=2, shard=8, expert=4))
    assert most_remote_peers(groups[axis], gpus_per_node) == remote


def test_peers_are_counted_as_if_rank_by_rank():
    sizes = product((1, 2, 3), (1, 2, 3, 5), (1, 4, 6))
    for ranks, stride, blocks, node in ((*each, node) for each in sizes for node in (1, 2, 3, 4, 7, 8, 100)):
        rank_numbers = [
            [block * ranks * stride + first + stride * index for index in range(ranks)]
            for block in range(blocks)
            for first in range(stride)
        ]
        nodes = [Counter(number // node for number in group) for group in rank_numbers]
        remote = ranks - min(min(counts.values()) for counts in nodes)
        assert most_remote_peers(Groups(ranks, stride, ranks * stride * blocks), node) == remote


def test_a_million_ranks_are_planned_at_once():
    degrees = "mesh={replicate: 1000, shard: 1000}"
    recipe = load_recipe(QUICKSTART, [degrees, "global_train_batch_size=1000000"], 1_000_000)
    sent = {entry.axis: entry for entry in make_plan(recipe, 1_000_000, 7).traffic}
    assert sent["shard"].ranks == 1000
    assert sent["replicate"].across_nodes == sent["replicate"].sent


# --------------------------------------------------------------------------------------------------------- activations


SIZES = [
    "model.d_model=128",
    "model.vocab_size=61",
    "model.ffn_hidden_size=320",
    "model.moe.num_experts=8",
    "model.moe.top_k=3",
    "model.moe.expert_hidden_size=96",
    "max_seq_len=128",
    "global_train_batch_size=2",
    "device_train_microbatch_size=2",
]


def real_model(recipe, dtype=torch.float32):
    model = meta_model(recipe.model)
    parallelize(model, None, recipe.precision, recipe.activation_checkpointing)
    materialize(model, "cpu", 0)
    return model.to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_kept_in_fp8_are_counted_where_a_rank_has_them_whole(variant: str) -> None:
    exclude = "precision.fp8.exclude=[lm_head, '*.router.gate', layers.2, '*.o_proj']"
    keys, fp8 = [*ODD, *VARIANTS[variant], "model.moe.num_shared_experts=1"], [FP8, exclude]
    recipe = load_recipe(QUICKSTART, [*keys, *fp8], 1)
    model = meta_model(recipe.model)
    apply_precision(model, recipe.precision)
    kept = {Fp8Experts: 0, Fp8Linear: 0}
    for module in model.modules():
        for weight in module._parameters.values() if isinstance(module, tuple(kept)) else ():
            if weight is not None:
                *matrices, rows, columns = weight.shape
                blocks = prod(matrices) * -(-rows // 128) * -(-columns // 128)
                kept[Fp8Experts if matrices else Fp8Linear] += weight.numel() + blocks
    assert all(kept.values())

    def bytes_of(*more: str, world: int = 1, backend_name: str = "", gathers: bool = False) -> int:
        made = [*keys, *more, f"global_train_batch_size={world}"]
        backend = [f"precision.fp8.backend={backend_name}"] if backend_name else []
        backend += ["precision.fp8.fsdp_all_gather=true"] if gathers else []
        recipes = (load_recipe(QUICKSTART, [*made, *last], world) for last in ([*fp8, *backend], []))
        with_fp8, without = (make_plan(recipe, world).memory.parameters for recipe in recipes)
        return with_fp8 - without

    whole = sum(kept.values())
    assert bytes_of() == 2 * whole
    assert bytes_of(backend_name="reference") == whole
    assert bytes_of("mesh={replicate: 4, shard: 1, expert: 1}", world=4) == 2 * whole
    assert bytes_of("mesh={replicate: 1, shard: 4, expert: 1}", world=4) == 0
    assert bytes_of("mesh={replicate: 2, shard: 4, expert: 4}", world=8) == 2 * kept[Fp8Experts] // 4
    assert bytes_of("mesh={replicate: 1, shard: 8, expert: 4}", world=8) == 0
    for mesh, ranks, share in (
        ("{replicate: 1, shard: 4, expert: 1}", 4, kept[Fp8Experts] // 4),  # whole experts
        ("{replicate: 1, shard: 8, expert: 4}", 8, kept[Fp8Experts] // 8),
        ("{replicate: 1, shard: 5, expert: 1}", 5, 0),
    ):
        assert bytes_of(f"mesh={mesh}", world=ranks, gathers=True) == share


LATENT = "model.attention={kind: mla, n_heads: 4, q_lora_rank: 48, kv_lora_rank: 32, qk_nope_head_dim: 24"
LATENT += ", qk_rope_head_dim: 8, v_head_dim: 32}"


WITHOUT, WITH_FP8, WITH_BOTH = (), (FP8,), (LATENT, FP8)
FAST = [
    (True, "none", torch.float32, WITHOUT),
    (True, "selective", torch.bfloat16, WITHOUT),
    (False, "full", torch.float32, WITHOUT),
    (True, "selective", torch.float32, WITH_BOTH),
    (False, "none", torch.bfloat16, WITH_FP8),
]
"""Each value; the other combinations are slow."""
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in product(
        (False, True),
        ("none", "selective", "full"),
        (torch.float32, torch.bfloat16),
        (WITHOUT, WITH_FP8, WITH_BOTH),
    )
]


@pytest.mark.parametrize(("sparse", "mode", "dtype", "more"), CASES)
def test_saved_activations_of_a_block(sparse, mode, dtype, more):
    def saved(layers: int) -> int:
        dense = 0 if sparse else layers
        sizes = [f"model.n_layers={layers}", f"model.n_dense_layers={dense}", f"activation_checkpointing={mode}", *more]
        model, ids = real_model(load_recipe(QUICKSTART, [*SIZES, *sizes]), dtype), batch(2, 128)
        with torch.no_grad():
            model(ids, ids)  # keeps its weights in FP8
        with PeakMemory(model.parameters()) as alive:
            losses = model(ids, ids)
            gc.collect()
            return alive.now() - losses.lm.nbytes

    cfg, c, fp8 = load_recipe(QUICKSTART, [*SIZES, *more]).model, dtype.itemsize, FP8 in more
    formula = block_activations(cfg, sparse, ActivationCheckpointing(mode), c, fp8=fp8).saved
    if mode == "none" and not fp8:  # the projection after attention keeps its input in another layout
        formula += c * cfg.d_model
    measured = (saved(3) - saved(1)) / 2 / (2 * 128)
    assert measured == pytest.approx(formula, rel=0.03)


def test_a_curriculum_is_planned_by_the_stage_that_needs_most_memory() -> None:
    """Here the one of short rows, as its micro-batches are larger; the tables say which."""
    stages = "curriculum={short: {until: 10ba, max_seq_len: 256, device_train_microbatch_size: 8}, long: {}}"
    sizes = ["global_train_batch_size=16", "device_train_microbatch_size=2"]
    plan = make_plan(load_recipe(QUICKSTART, [stages, *sizes]), 2)
    short = ["max_seq_len=256", "global_train_batch_size=16", "device_train_microbatch_size=8"]
    alone, long = (make_plan(load_recipe(QUICKSTART, keys), 2) for keys in (short, sizes))
    assert plan.memory == alone.memory != long.memory
    assert (plan.stage, plan.tokens_per_micro_batch, plan.micro_batches) == ("short", 2048, 1)
    assert "stage short of the curriculum, which needs most memory" in plan_table(plan, 80)
    assert "curriculum" not in plan_table(long, 80)


def test_an_indexer_takes_memory_where_a_sequence_has_more_keys_than_it_chooses():
    recipe = str(QUICKSTART.parent / "pretrain/deepseek-v3.2-671b.yaml")

    def peak(length, mode, stage="frozen"):
        changes = [
            f"max_seq_len={length}",
            f"activation_checkpointing={mode}",
            f"model.attention.indexer.stage={stage}",
        ]
        return make_plan(load_recipe(recipe, changes, 2048), 2048).memory.peak

    scores = 2 * 4 * 64 * 4096 * 4096  # of 64 heads in fp32, two at a time
    assert peak(2048, "full").moment.startswith("the loss")
    assert peak(4096, "full").moment == "backward of layers.59"
    assert scores < peak(4096, "full").activations < 2 * scores
    assert peak(2048, "none", "sparse").activations > 1.02 * peak(2048, "none").activations
