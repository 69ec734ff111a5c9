"""A run of each stage of sparse attention: from a dense checkpoint to a sparse one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.config import Recipe, UserError
from tests.train.runs import Run, run_recipe

LATENT = (
    "kind: mla, n_heads: 4, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8"
)
SIZES = "top_k: 8, n_heads: 2, head_dim: 8"
COMMON = ("max_duration=6ba", "save_interval=6ba", "scheduler.t_warmup=0ba", "eval_interval=6ba")


def attention(stage: str | None = None) -> str:
    indexer = "" if stage is None else f", indexer: {{{SIZES}, stage: {stage}}}"
    return f"model.attention={{{LATENT}{indexer}}}"


def stored(run: Run) -> dict[str, torch.Tensor]:
    tensors = StoredTensors(run.run_dir / "checkpoints" / "ba6", "model/model.")
    return {name: tensors.read(name) for name in tensors.specs}


def begun(run: Run) -> tuple[str, str]:
    return f"load_path={run.run_dir}", "load_weights_only=true"


@pytest.fixture(scope="module")
def dense(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("dense") / "run", attention(), *COMMON))


def test_from_dense_attention_to_sparse(tiny_recipe: Callable[..., Recipe], tmp_path: Path, dense: Run) -> None:
    warm = run_recipe(tiny_recipe(tmp_path / "warm", attention("warm_up"), *COMMON, *begun(dense)))
    before, after = stored(dense), stored(warm)
    assert after.keys() - before.keys() == {name for name in after if ".indexer." in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "all else is frozen"
    kl = warm.column("indexer/kl")
    assert kl[6] < 0.9 * kl[1]
    assert warm.column("loss/train/indexer")[1] == pytest.approx(3 * kl[1])
    total, parts = (warm.metrics[0][f"loss/train/{name}"] for name in ("total", "lm")), ("balance", "z", "indexer")
    whole, lm = total
    assert whole == pytest.approx(lm + sum(warm.metrics[0][f"loss/train/{name}"] for name in parts))

    sparse = run_recipe(tiny_recipe(tmp_path / "sparse", attention("sparse"), *COMMON, *begun(warm)), 2)
    trained = stored(sparse)
    assert trained.keys() == after.keys()
    assert not any(torch.equal(trained[name], after[name]) for name in after if name.endswith("_proj.weight"))
    assert not any(torch.equal(trained[name], after[name]) for name in after if ".indexer." in name)
    assert sparse.column("loss/train/lm")[6] < dense.column("loss/train/lm")[6]

    frozen = run_recipe(tiny_recipe(tmp_path / "frozen", attention("frozen"), *COMMON, *begun(sparse)))
    assert all(torch.equal(stored(frozen)[name], trained[name]) for name in trained if ".indexer." in name)
    assert "indexer/kl" not in frozen.metrics[0]


def test_a_stage_that_is_stopped_goes_on_with_the_same_numbers(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, dense: Run
) -> None:
    changes = (attention("warm_up"), *COMMON, *begun(dense))
    whole = run_recipe(tiny_recipe(tmp_path / "whole", *changes))
    part = run_recipe(tiny_recipe(tmp_path / "part", *changes, "max_duration=3ba", "save_interval=3ba"))
    goes_on = f"load_path={part.run_dir}", "load_weights_only=false", "max_duration=6ba"
    resumed = run_recipe(tiny_recipe(tmp_path / "resumed", *changes, *goes_on))
    assert resumed.column("indexer/kl") == {batch: kl for batch, kl in whole.column("indexer/kl").items() if batch > 3}


def test_only_indexers_that_learn_may_be_missing(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, dense: Run
) -> None:
    with pytest.raises(UserError, match=r"another architecture:\n  model.attention.indexer.top_k: \S+ there, 8 here"):
        run_recipe(tiny_recipe(tmp_path / "frozen", attention("frozen"), *COMMON, *begun(dense)))
    recipe = json.loads((dense.run_dir / "checkpoints" / "ba6" / "state.json").read_text())["recipe"]
    assert recipe["model.attention.indexer"] is None
