"""The recipes of configs/pretrain declare the published models, their tiny twins the same architecture, and the page
of families says what they count."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.config import MlaConfig, ModelConfig, Recipe, load_recipe
from moefoundry.conversion.families import family_of
from moefoundry.conversion.families.family import computed, dense_layers
from moefoundry.planning.describe import count_parameters
from tests.conftest import QUICKSTART
from tests.conversion.families.published import PUBLISHED
from tests.train.runs import run_recipe

ROOT = Path(__file__).parents[3]
PRETRAIN = ROOT / "configs" / "pretrain"

names = pytest.mark.parametrize("name", PUBLISHED)


def recipe_of(name: str) -> Recipe:
    return load_recipe(PRETRAIN / f"{name}.yaml")


def features(cfg: ModelConfig) -> dict[str, object]:
    """What an architecture has, whatever its sizes."""
    attention, moe = cfg.attention, cfg.moe
    return {
        "norm": cfg.norm,
        "tied": cfg.tie_embeddings,
        "dense": [i for i in dense_layers(cfg) if i == 0],
        "attention": attention.kind,
        "theta": attention.rope_theta,
        "compressed_queries": isinstance(attention, MlaConfig) and attention.q_lora_rank is not None,
        "own_head_dim": getattr(attention, "head_dim", None) is not None,
        "grouped": getattr(attention, "n_kv_heads", attention.n_heads) < attention.n_heads,
        "indexer": getattr(attention, "indexer", None) is not None,
        "qk_norm": getattr(attention, "qk_norm", None),
        "clip": getattr(attention, "clip_qkv", None),
        "bias": getattr(attention, "bias", None),
        "rotation": (getattr(attention, "rotary_fraction", 1.0), getattr(attention, "rotary_interleaved", True)),
        "output_gate": getattr(attention, "output_gate", False),
        "linear": None if cfg.linear_attention is None else cfg.linear_attention.full_attention_interval,
        "own_scale": getattr(attention, "softmax_scale", None) is not None,
        "multipliers": cfg.multipliers,
        "swiglu": cfg.swiglu,
        "sinks": attention.sinks,
        "rotated": [attention.is_rotated(block) for block in range(4)],
        "head_bias": cfg.head_bias,
        "windows": [attention.window_of(block) is not None for block in range(3)],
        "biased_experts": moe.projection_bias,
        "gate": moe.shared_expert_gate,
        "router": replace(moe.router, num_groups=1, top_k_groups=1),
        "limited_groups": moe.router.top_k_groups < moe.router.num_groups,
        "shared": moe.num_shared_experts,
        "balance": (moe.balance.aux_loss_scope, moe.balance.bias_update_rate, moe.balance.bias_freeze_at is not None),
        "z_loss": moe.balance.z_loss_weight > 0,
        "mtp": cfg.mtp,
    }


def test_there_is_a_recipe_and_a_twin_of_each() -> None:
    assert {path.stem for path in PRETRAIN.glob("*.yaml")} == PUBLISHED.keys()
    assert {path.stem for path in (PRETRAIN / "tiny").glob("*.yaml")} == PUBLISHED.keys()


@names
def test_a_recipe_declares_the_published_model(name: str) -> None:
    expected = family_of(PUBLISHED[name]).read_config(PUBLISHED[name])
    cfg = recipe_of(name).model
    expected.attention.yarn = expected.attention.longrope = None  # they came after pre-training
    if name == "hunyuan-a13b-80b":
        expected.attention.rope_theta = 10000.0  # the extension made it larger
    if name == "deepseek-v3-671b":
        expected.init.std = 0.006  # the report's, not the file's
    if name == "qwen3-next-80b-a3b":
        expected.mtp.depth = 1  # the files hold a module, of which the config says nothing
    assert computed(cfg) == computed(expected)
    assert cfg.init == expected.init
    assert cfg.moe.router.input_jitter == expected.moe.router.input_jitter


@names
def test_the_tiny_twin_has_the_same_features(name: str) -> None:
    recipe, twin = recipe_of(name), load_recipe(PRETRAIN / "tiny" / f"{name}.yaml")
    assert features(twin.model) == features(recipe.model)
    assert count_parameters(twin.model).total < 1e6
    quickstart = load_recipe(QUICKSTART)
    assert (twin.model.vocab_size, twin.max_seq_len) == (quickstart.model.vocab_size, quickstart.max_seq_len)
    assert twin.train_loader.dataset.local == quickstart.train_loader.dataset.local
    assert Path(twin.run_dir).parts == ("runs", "tiny", name)


@names
def test_the_tiny_twin_trains(name: str, tiny_corpus: Path, tmp_path: Path) -> None:
    changes = [
        *("max_seq_len=64", f"train_loader.dataset.local={tiny_corpus}", f"run_dir={tmp_path / name}"),
        *("max_duration=2ba", "optimizer.lr=1e-2", "scheduler.t_warmup=0ba", "eval_interval=2ba"),
        *("save_interval=1000ba", "callbacks.report=null"),
    ]
    recipe = load_recipe(PRETRAIN / "tiny" / f"{name}.yaml", changes)
    run = run_recipe(recipe)
    losses = run.column("loss/train/lm")
    assert list(losses) == [1, 2]
    assert abs(losses[1] - math.log(recipe.model.vocab_size)) < 0.3  # nothing is known yet
    learned = 0.1 / recipe.model.multipliers.logits_divisor  # in one step
    assert run.column("metrics/eval/LanguageCrossEntropy")[2] < losses[1] - learned
    further = run.column("loss/train/mtp").get(1, 0.0)
    assert (further > 0) == (recipe.model.mtp.depth > 0)


@names
def test_the_page_of_families_has_the_counts(name: str) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \[{name}\].*$", page, re.MULTILINE)
    counts = count_parameters(recipe_of(name).model)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == [f"{counts.total / 1e9:.2f}B", f"{counts.active / 1e9:.2f}B"]
