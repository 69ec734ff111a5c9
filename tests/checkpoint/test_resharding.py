"""Tensors are stored under the single process's names, whole: what one mesh saved, any other reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moefoundry.config import Recipe
from tests.distributed import run_distributed


def whole_tensors(recipe: Recipe, build_or_train: str) -> dict[str, Tensor]:
    """Of model and optimizer, when ``recipe`` has been built, or trained too."""
    from torch.distributed.tensor import DTensor

    from moefoundry import build as parts
    from moefoundry.checkpoint.state import optimizer_tensors, trained_tensors
    from moefoundry.trainer import train

    trainer = train(recipe) if build_or_train == "train" else parts.build_trainer(recipe)
    state = trainer.state
    tensors = {**trained_tensors(state.model), **optimizer_tensors(state.model, state.optimizers[0])}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), (1, 2)])
def test_saved_on_some_ranks_and_loaded_on_others(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, saved_on: int, loaded_on: int
) -> None:
    saved = run_distributed(whole_tensors, saved_on, tiny_recipe(tmp_path / "saved"), "train")[0]
    loading = tiny_recipe(tmp_path / "loaded", f"load_path={tmp_path / 'saved'}", "seed=99", "max_duration=5ba")
    loaded = run_distributed(whole_tensors, loaded_on, loading, "build")[0]
    assert loaded.keys() == saved.keys()
    assert "optimizer/model.layers.1.ffn.experts.gate_proj/exp_avg_sq" in saved
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
