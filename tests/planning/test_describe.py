"""Parameter counts against a model that really exists and against the closed form."""

from dataclasses import replace

import pytest
import torch

from moefoundry.config import GqaConfig, ModelConfig, load_recipe
from moefoundry.model.transformer import MoETransformer
from moefoundry.moe.layer import MoELayer
from moefoundry.planning.describe import ParameterCounts, count_parameters
from tests.conftest import QUICKSTART
from tests.model.tiny import tiny_config

VARIANTS = {
    "default": {},
    "tied": {"tie_embeddings": True},
    "all_sparse": {"n_dense_layers": 0},
    "all_dense": {"n_dense_layers": 3},
    "no_shared": {"num_shared_experts": 0},
    "two_shared": {"num_shared_experts": 2},
    "one_choice": {"top_k": 1},
    "every_expert": {"top_k": 4},
    "multi_query": {"n_kv_heads": 1},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def closed_form(cfg: ModelConfig) -> ParameterCounts:
    """By hand, from the sizes of the recipe."""
    width, moe, attention = cfg.d_model, cfg.moe, cfg.attention
    assert isinstance(attention, GqaConfig)
    key_width = width // attention.n_heads * attention.n_kv_heads
    block = 2 * width + 2 * width * width + 2 * width * key_width  # two norms; q and o; k and v
    sparse_layers = cfg.n_layers - cfg.n_dense_layers
    expert = 3 * width * moe.expert_hidden_size
    embedding = cfg.vocab_size * width
    routed = sparse_layers * moe.num_experts * expert
    others = (
        embedding * (1 if cfg.tie_embeddings else 2)
        + cfg.n_layers * block
        + cfg.n_dense_layers * 3 * width * cfg.ffn_hidden_size
        + sparse_layers * (width * moe.num_experts + moe.num_shared_experts * expert)
        + width
    )
    return ParameterCounts(others + routed, others + sparse_layers * moe.top_k * expert, routed, embedding)


@variants
def test_counts_match_the_closed_form(variant: dict) -> None:
    cfg = tiny_config(**variant)
    assert count_parameters(cfg) == closed_form(cfg)


@variants
def test_total_is_the_sum_over_a_real_model(variant: dict) -> None:
    cfg = tiny_config(**variant)
    assert count_parameters(cfg).total == sum(p.numel() for p in MoETransformer(cfg).parameters())


def test_the_default_recipe_matches_the_closed_form() -> None:
    cfg = load_recipe(QUICKSTART).model
    assert count_parameters(cfg) == closed_form(cfg)


def test_active_is_less_than_total_unless_every_expert_is_chosen() -> None:
    counts, all_chosen = count_parameters(tiny_config()), count_parameters(tiny_config(top_k=4))
    assert counts.active < counts.total
    assert all_chosen.active == all_chosen.total == counts.total


def test_multi_token_prediction_counts_apart() -> None:
    cfg = tiny_config()
    without = count_parameters(cfg)
    cfg.mtp.depth = 2
    width, blocks = cfg.d_model, [layer for layer in MoETransformer(cfg).layers if isinstance(layer.ffn, MoELayer)]
    block = sum(parameter.numel() for parameter in blocks[0].parameters())
    further = 2 * (3 * width + 2 * width * width + block)  # three norms, the projection, and a sparse block
    assert count_parameters(cfg) == replace(without, mtp=further)
    assert str(count_parameters(cfg)).endswith(f", and {further} for multi-token prediction")


def test_a_model_of_hundreds_of_billions_is_counted_without_being_allocated() -> None:
    cfg = ModelConfig(vocab_size=129_280, d_model=7168, n_layers=61, n_dense_layers=3, ffn_hidden_size=18_432)
    cfg.attention = GqaConfig(n_heads=56, n_kv_heads=8)
    cfg.moe.num_experts, cfg.moe.top_k, cfg.moe.expert_hidden_size = 256, 8, 2048
    counts = count_parameters(cfg)
    assert counts == closed_form(cfg)
    assert counts.total > 600e9
    assert torch.empty(0).device.type == "cpu"  # the meta device is left again


@pytest.mark.parametrize(
    ("total", "active", "text"),
    [
        (671_026_419_200, 37_552_297_472, "671.03B parameters, 37.55B active"),
        (13_760_000, 999_999, "13.76M parameters, 999999 active"),
    ],
)
def test_text_is_rounded_for_people(total: int, active: int, text: str) -> None:
    assert str(ParameterCounts(total, active, 0, 0)) == text
