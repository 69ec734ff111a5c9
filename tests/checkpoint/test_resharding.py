"""Tensors are stored under the single process's names, whole: what one mesh saved, any other reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moefoundry.config import Recipe
from tests.distributed import run_distributed


def trained_tensors(recipe: Recipe) -> dict[str, Tensor]:
    """Whole tensors of model and optimizer after ``recipe``."""
    from torch.distributed.tensor import DTensor

    from moefoundry.checkpoint.state import model_tensors, optimizer_tensors
    from moefoundry.train import train

    state = train(recipe).state
    tensors = {**model_tensors(state.model), **optimizer_tensors(state.model, state.optimizers[0])}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), (1, 2)])
def test_saved_on_some_ranks_and_loaded_on_others(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, saved_on: int, loaded_on: int
) -> None:
    """The loading run starts where the saving one ended, so it trains nothing."""
    saved = run_distributed(trained_tensors, saved_on, tiny_recipe(tmp_path / "saved"))[0]
    loading = tiny_recipe(tmp_path / "loaded", f"load_path={tmp_path / 'saved'}", "seed=99")
    loaded = run_distributed(trained_tensors, loaded_on, loading)[0]
    assert loaded.keys() == saved.keys()
    assert "optimizer/model.layers.1.ffn.experts.gate_proj/exp_avg_sq" in saved
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
