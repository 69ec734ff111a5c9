"""A run of each stage of sparse attention: from a dense checkpoint to a sparse one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.config import Recipe, UserError, load_recipe
from tests.train.runs import Run, run_recipe

LATENT = (
    "model.attention={kind: mla, n_heads: 4, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 8, v_head_dim: 8, "
    "qk_rope_head_dim: 4"
)
Stage = Callable[..., Recipe]
COMMON = ("max_duration=6ba", "save_interval=6ba", "scheduler.t_warmup=0ba", "eval_interval=6ba")


@pytest.fixture(scope="module")
def stage(tiny_overrides: Callable[..., list[str]]) -> Stage:
    """``stage(run_dir, "frozen", "key=value", ...)``: a tiny recipe of a stage, or with dense attention."""

    def recipe(run_dir: Path, name: str | None, *changes: str) -> Recipe:
        indexer = "" if name is None else f", indexer: {{top_k: 8, n_heads: 2, head_dim: 8, stage: {name}}}"
        others = [each for each in tiny_overrides(run_dir) if not each.startswith("model.attention")]
        return load_recipe(None, [*others, f"{LATENT}{indexer}}}", *COMMON, *changes])

    return recipe


def stored(run: Run) -> dict[str, torch.Tensor]:
    tensors = StoredTensors(run.run_dir / "checkpoints" / "ba6", "model/model.")
    return {name: tensors.read(name) for name in tensors.specs}


def begun(run: Run) -> tuple[str, str]:
    return f"load_path={run.run_dir}", "load_weights_only=true"


@pytest.fixture(scope="module")
def dense(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(stage(tmp_path_factory.mktemp("dense") / "run", None))


def test_from_dense_attention_to_sparse(stage: Stage, tmp_path: Path, dense: Run) -> None:
    warm = run_recipe(stage(tmp_path / "warm", "warm_up", *begun(dense)))
    before, after = stored(dense), stored(warm)
    assert after.keys() - before.keys() == {name for name in after if ".indexer." in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "all else is frozen"
    kl = warm.column("indexer/kl")
    assert kl[6] < 0.9 * kl[1]
    assert warm.column("loss/train/indexer")[1] == pytest.approx(3 * kl[1])
    total, parts = (warm.metrics[0][f"loss/train/{name}"] for name in ("total", "lm")), ("balance", "z", "indexer")
    whole, lm = total
    assert whole == pytest.approx(lm + sum(warm.metrics[0][f"loss/train/{name}"] for name in parts))

    sparse = run_recipe(stage(tmp_path / "sparse", "sparse", *begun(warm)), 2)
    trained = stored(sparse)
    assert trained.keys() == after.keys()
    assert not any(torch.equal(trained[name], after[name]) for name in after if name.endswith("_proj.weight"))
    assert not any(torch.equal(trained[name], after[name]) for name in after if ".indexer." in name)
    assert sparse.column("loss/train/lm")[6] < dense.column("loss/train/lm")[6]


@pytest.mark.slow
def test_a_stage_that_is_stopped_goes_on_with_the_same_numbers(stage: Stage, tmp_path: Path, dense: Run) -> None:
    whole = run_recipe(stage(tmp_path / "whole", "warm_up", *begun(dense), "save_interval=3ba"))
    goes_on = f"load_path={whole.run_dir}/checkpoints/ba3"
    resumed = run_recipe(stage(tmp_path / "resumed", "warm_up", goes_on))
    assert resumed.exact() == whole.exact(4)
    assert resumed.column("indexer/kl") == {batch: kl for batch, kl in whole.column("indexer/kl").items() if batch > 3}


@pytest.mark.slow
def test_frozen_indexers_stay_as_they_are(stage: Stage, tmp_path: Path, dense: Run) -> None:
    warm = run_recipe(stage(tmp_path / "warm", "warm_up", *begun(dense)))
    frozen = run_recipe(stage(tmp_path / "frozen", "frozen", *begun(warm)))
    before, after = stored(warm), stored(frozen)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in after if ".indexer." in name)
    assert "indexer/kl" not in frozen.metrics[0]


def test_only_indexers_that_learn_may_be_missing(stage: Stage, tmp_path: Path, dense: Run) -> None:
    with pytest.raises(UserError, match=r"another architecture:\n  model.attention.indexer.top_k: \S+ there, 8 here"):
        run_recipe(stage(tmp_path / "frozen", "frozen", *begun(dense)))
    recipe = json.loads((dense.run_dir / "checkpoints" / "ba6" / "state.json").read_text())["recipe"]
    assert recipe["model.attention.indexer"] is None
