"""Memory of a rank beside what steps of every published model in small really take, as torch tracks it.

What is always there is planned exactly. The peak of what comes and goes is within 10%, on meshes of one, two and four
ranks, in every checkpointing mode, in FP32, BF16 and FP8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import pytest

from moefoundry.config import Recipe, load_recipe
from moefoundry.planning.plan import make_plan
from tests.distributed import run_distributed
from tests.planning.peaks import measure

TWINS = Path(__file__).parents[2] / "configs/pretrain/tiny"
NAMES = sorted(path.stem for path in TWINS.glob("*.yaml"))
MESHES = {"one": (1, 1, 1), "fsdp": (1, 2, 1), "experts": (1, 2, 2), "hsdp": (2, 2, 2)}
MODES = ("none", "selective", "full")
PRECISIONS = {
    "fp32": "{compute: fp32, fp8: {recipe: null}}",
    "bf16": "{compute: bf16, fp8: {recipe: null}}",
    "fp8": "{compute: bf16, fp8: {recipe: deepseek_v3}}",
}
SIZES = ("model.vocab_size=256", "max_seq_len=512", "device_train_microbatch_size=1", "eval_loader=null")
"""A small vocabulary, so that blocks and not logits are most."""
WITHIN = 0.10


def recipe_of(name: str, mesh: str, mode: str, precision: str, changes: Iterable[str] = ()) -> Recipe:
    replicate, shard, expert = MESHES[mesh]
    file, ranks = str(TWINS / f"{name}.yaml"), replicate * shard
    model = load_recipe(file, []).model
    expert = expert if model.moe.num_experts % expert == 0 else 1
    overrides = [
        *SIZES,
        f"mesh={{replicate: {replicate}, shard: {shard}, expert: {expert}}}",
        f"global_train_batch_size={ranks}",
        f"precision={PRECISIONS[precision]}",
        f"activation_checkpointing={mode}",
        "model.moe.router.assignment=uniform",
        *changes,
    ]
    if model.linear_attention is not None:
        overrides.append("model.linear_attention.backend=torch")  # the kernels are a GPU's
    return load_recipe(file, overrides, world_size=ranks)


def check(recipes: Iterable[Recipe], ranks: int) -> Iterator[str]:
    """Yield a line for each recipe whose plan is off."""
    recipes = list(recipes)
    measured = run_distributed(measure, ranks, recipes, timeout=280)
    for index, recipe in enumerate(recipes):
        plan = make_plan(recipe, ranks).memory
        name = f"{recipe.run_name} {recipe.activation_checkpointing} {recipe.precision}"
        *exact, peak = (max(values) for values in zip(*(rank[index] for rank in measured), strict=True))
        if exact != [plan.parameters, plan.gradients, plan.optimizer]:
            yield f"{name}: {exact} of parameters, gradients and moments; planned {plan}"
        if plan.peak.total != pytest.approx(peak, rel=WITHIN):
            yield f"{name}: peak {peak:,} planned {plan.peak.total:,} ({plan.peak.moment})"


SAMPLE = {
    "one": [("qwen3-30b-a3b", "selective", "bf16"), ("deepseek-v3-671b", "none", "fp8")],
    "fsdp": [("glm-4.5-355b", "full", "fp32"), ("gpt-oss-20b", "none", "bf16")],
    "experts": [("kimi-k2-1026b", "full", "bf16"), ("dbrx-132b", "selective", "fp32")],
}


@pytest.mark.parametrize("mesh", ["one", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("experts", "fsdp"))])
def test_a_sample_peaks_as_planned(mesh: str) -> None:
    replicate, shard, _ = MESHES[mesh]
    recipes = [recipe_of(name, mesh, mode, precision) for name, mode, precision in SAMPLE[mesh]]
    assert [*check(recipes, replicate * shard)] == []


@pytest.mark.parametrize("mesh", ["fsdp", pytest.param("experts", marks=pytest.mark.slow)])
def test_whole_parameters_and_gradients_take_what_is_planned(mesh: str) -> None:
    changes = [["mesh.gather=each_step"], ["mesh.reduce=each_step"], ["mesh.gather=each_step", "mesh.reduce=each_step"]]
    several = ["global_train_batch_size=4"]
    recipes = [recipe_of("qwen3-30b-a3b", mesh, "full", "bf16", [*change, *several]) for change in changes]
    assert [*check(recipes, 2)] == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda number: NAMES[number])
def test_every_model_peaks_as_planned(number: int, mesh: str) -> None:
    """On one rank each mode in each precision; on a mesh each mode in one, which change with model and mesh."""
    replicate, shard, _ = MESHES[mesh]
    turn = number + [*MESHES].index(mesh)
    pairs = [*product(MODES, PRECISIONS)] if mesh == "one" else [*zip(MODES, shifted([*PRECISIONS], turn), strict=True)]
    recipes = [recipe_of(NAMES[number], mesh, mode, precision) for mode, precision in pairs]
    assert [*check(recipes, replicate * shard)] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["warm_up", "sparse"])
def test_an_indexer_that_learns_peaks_as_planned(stage: str) -> None:
    cases = [("none", "fp32"), ("none", "bf16"), ("full", "bf16")]
    learning = [f"model.attention.indexer.stage={stage}"]
    recipes = [recipe_of("deepseek-v3.2-671b", "one", mode, precision, learning) for mode, precision in cases]
    assert [*check(recipes, 1)] == []


def shifted(items: list[str], by: int) -> list[str]:
    """The same in turn, from another one on."""
    return [items[(index + by) % len(items)] for index in range(len(items))]


@pytest.mark.slow
def test_torchs_own_tracker_finds_the_same_peak() -> None:
    """Of what the operations of a step take on a CPU, without the ways of a GPU."""
    from tests.planning.peaks import both_trackers

    ours, torchs = both_trackers(recipe_of("olmoe-1b-7b", "one", "none", "fp32"))
    assert ours == pytest.approx(torchs, rel=0.02)
