"""A stored recipe may be older than a key: what may be missing then, and what may not."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from moefoundry.config import GqaConfig, MlaConfig, ModelConfig, QkNorm, YarnConfig
from moefoundry.config.build import Builder, changes_nothing
from moefoundry.config.spec import plain

YARN = ModelConfig(attention=GqaConfig(qk_norm=QkNorm.head, yarn=YarnConfig(mscale=0.7)), dense_layers=[3])
LATER = {
    "dense_layers",
    "document_masking",
    "attention.yarn",
    "attention.head_dim",
    "attention.qk_norm",
    "attention.bias",
    "attention.clip_qkv",
    "attention.sliding_window",
    "moe.router.input_jitter",
    "moe.balance.bias_freeze_at",
}
"""Keys that came after the first release of the schema."""


def build(tree: dict[str, Any]) -> tuple[ModelConfig, list[str]]:
    builder = Builder()
    return builder.build(ModelConfig, tree, "model"), [str(problem) for problem in builder.problems]


def without(cfg: ModelConfig, path: str) -> dict[str, Any]:
    tree = node = plain(cfg)
    *parents, leaf = path.split(".")
    for parent in parents:
        node = node[parent]
    del node[leaf]
    return tree


@pytest.mark.parametrize("path", sorted(LATER))
def test_a_key_that_came_later_means_what_was_before_it(path: str) -> None:
    tree = without(YARN, path)
    *parents, leaf = path.split(".")
    expected: Any = ModelConfig()
    for parent in (*parents, leaf):
        expected = getattr(expected, parent)
    cfg, problems = build(tree)
    assert problems == []
    found: Any = cfg
    for parent in (*parents, leaf):
        found = getattr(found, parent)
    assert found == expected
    assert without(cfg, path) == tree, "the other keys are as they were stored"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("d_model", "model.d_model: missing; allowed: an integer >= 1"),
        ("moe", "model.moe: missing; allowed: a mapping"),
        ("moe.router.score_function", "model.moe.router.score_function: missing; allowed: softmax, sigmoid"),
        ("attention.rope_theta", "model.attention.rope_theta: missing; allowed: a number > 0"),
        ("attention.yarn.factor", "model.attention.yarn.factor: missing; allowed: a number >= 1"),
    ],
)
def test_what_has_no_neutral_value_is_never_guessed(path: str, problem: str) -> None:
    assert build(without(YARN, path))[1] == [problem]


def test_variants_keep_their_own_keys() -> None:
    cfg = replace(ModelConfig(), attention=MlaConfig())
    assert build(without(cfg, "attention.q_lora_rank")) == (cfg, [])
    assert build(without(cfg, "attention.v_head_dim"))[1] == [
        "model.attention.v_head_dim: missing; allowed: an integer >= 1"
    ]


def test_what_changes_nothing() -> None:
    assert all(map(changes_nothing, (None, False, 0, 0.0, "none", [], {}, {"a": None, "b": {"c": False}})))
    assert not any(map(changes_nothing, (True, 1, 0.5, "head", [0], {"a": None, "b": {"c": 1}})))
    assert not changes_nothing(asdict(YarnConfig()))
