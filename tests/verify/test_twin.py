"""Twins of all recipes: small, valid, and with the parts of the recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.config import GqaConfig, Recipe, check_recipe, load_recipe
from moefoundry.verify.twin import Twin, make_twin
from tests.conftest import QUICK, QUICKSTART

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "tasks")


def twin_of(*changes: str) -> Recipe:
    return make_twin(load_recipe(None, [*QUICK, *changes]), Path("/nowhere")).recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_has_a_small_twin_with_its_parts(path: Path) -> None:
    recipe = load_recipe(path)
    twin: Twin = make_twin(recipe, Path("/nowhere"))
    model, moe, original = twin.recipe.model, twin.recipe.model.moe, recipe.model
    assert check_recipe(twin.recipe, 4) == []
    assert model.d_model <= 128
    assert moe.num_experts % 4 == 0
    assert moe.num_experts <= 16
    assert type(model.attention) is type(original.attention)
    assert (model.n_dense_layers > 0) == (original.n_dense_layers > 0)
    assert bool(model.dense_layers) == bool(original.dense_layers)
    assert (model.mtp.depth > 0) == (original.mtp.depth > 0)
    assert (moe.router.num_groups > 1) == (original.moe.router.num_groups > 1)
    assert (moe.router.top_k_groups < moe.router.num_groups) == (
        original.moe.router.top_k_groups < original.moe.router.num_groups
    )
    assert moe.balance == replace(original.moe.balance, bias_freeze_at=moe.balance.bias_freeze_at)
    assert moe.has_expert_bias == original.moe.has_expert_bias
    assert twin.recipe.losses == recipe.losses
    assert (twin.recipe.lora is None) == (recipe.lora is None)
    assert twin.recipe.precision == replace(recipe.precision, fp8=twin.recipe.precision.fp8)
    if isinstance(model.attention, GqaConfig) and isinstance(original.attention, GqaConfig):
        assert (model.attention.n_heads > model.attention.n_kv_heads) == (
            original.attention.n_heads > original.attention.n_kv_heads
        )
        assert model.attention.qk_norm == original.attention.qk_norm


def test_sizes_by_hand() -> None:
    """DeepSeek-V3's routing: 256 experts in 8 groups of 32, of which 4 may be reached, for 8 experts a token."""
    router = "{score_function: sigmoid, num_groups: 8, top_k_groups: 4}"
    moe = twin_of(f"model.moe={{num_experts: 256, top_k: 8, expert_hidden_size: 64, router: {router}}}").model.moe
    assert (moe.num_experts, moe.top_k, moe.router.num_groups, moe.router.top_k_groups) == (8, 2, 4, 2)


def test_a_window_keeps_its_share_of_the_length() -> None:
    window = "model.attention={n_heads: 8, n_kv_heads: 4, sliding_window: 128}"
    assert twin_of(window).model.attention.window == 12  # of 48, as 128 of 512
    assert twin_of(window.replace("128", "4096")).model.attention.window == 4096, "sees all, as before"


def test_a_block_of_each_rotary_embedding_is_kept() -> None:
    keys = "sliding_window: 128, sliding_window_layers: [1, 2, 3], sliding_window_rope_theta: 5"
    attention = twin_of(f"model.attention={{n_heads: 8, n_kv_heads: 4, {keys}, unrotated_layers: [3]}}").model.attention
    seen = {(attention.window_of(i), attention.is_rotated(i)) for i in range(4)}
    assert seen == {(None, True), (12, True), (12, False)}
    assert attention.rope_of(12).rope_theta == 5


def test_heads_keep_an_even_part_that_turns() -> None:
    attention = twin_of("model.attention={n_heads: 8, n_kv_heads: 4, head_dim: 96, rotary_fraction: 0.4}").model
    assert attention.attention.rotary_dim(attention.d_model) % 2 == 0


def test_adapters_keep_their_scale() -> None:
    lora = twin_of("lora={rank: 64, alpha: 32, use_rslora: true}", "load_path=somewhere").lora
    assert lora is not None
    assert lora.alpha / lora.rank**0.5 == pytest.approx(32 / 64**0.5)


def test_what_is_lost_is_named() -> None:
    narrow = ["precision.compute=bf16", "model.moe.dispatcher=deepep"]
    recipe = load_recipe(QUICKSTART, ["compile=true", "model.moe.backend=triton", *narrow])
    assert make_twin(recipe, Path("/nowhere")).lost == (
        "compile: True",
        "model.moe.backend: triton; auto takes its place",
        "model.moe.dispatcher: deepep; all_to_all takes its place",
    )
