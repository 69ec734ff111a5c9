"""Keys of model parts that combine freely, and the combinations that mean nothing."""

import pytest

from moefoundry.config import ConfigError, load_recipe
from tests.conftest import QUICK

BANDS = "{factor: 8.0, original_max_seq_len: 64}"


def test_parts_combine() -> None:
    changes = [
        *("model.attention.rotary_fraction=0.5", "model.attention.rotary_interleaved=true"),
        *("model.attention.softmax_scale=0.2", f"model.attention.llama3_rope={BANDS}"),
        *("model.multipliers.residual=0.5", "model.moe.shared_expert_gate=true", "model.moe.num_shared_experts=2"),
    ]
    model = load_recipe(None, [*QUICK, *changes]).model
    assert model.attention.rotary_dim(model.d_model) == model.d_model // model.attention.n_heads // 2
    assert model.attention.llama3_rope.high_freq_factor == 4.0
    assert (model.multipliers.embedding, model.multipliers.residual) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.attention.rotary_fraction=0.1"], "model.attention.rotary_fraction: 0.1 of a head of"),
        (["model.attention.rotary_fraction=1.5"], "model.attention.rotary_fraction: got 1.5"),
        (
            ["model.moe.shared_expert_gate=true", "model.moe.num_shared_experts=0"],
            "model.moe.shared_expert_gate: true, but model.moe.num_shared_experts is 0",
        ),
        (
            [f"model.attention.llama3_rope={BANDS}", f"model.attention.yarn={BANDS}"],
            "model.attention.llama3_rope: on, and model.attention.yarn is on, too",
        ),
        (
            ["model.attention.llama3_rope={factor: 8.0, high_freq_factor: 1.0}"],
            "model.attention.llama3_rope.high_freq_factor: 1.0 is not more than low_freq_factor, 1.0",
        ),
        (["model.attention.partial_rotary_factor=0.5"], "did you mean 'model.attention.rotary_fraction'"),
        (["model.logits_scaling=2.0"], "logits_divisor"),
    ],
)
def test_what_means_nothing_is_named(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [*QUICK, *changes])
    assert message in str(caught.value)
