"""FP8 training as a run: on meshes, through checkpoints, with an average of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import Recipe
from tests.train.runs import Run, run_recipe

Tiny = Callable[..., Recipe]
SAVED_AT, LAST = 4, 8
FP8 = (
    "precision={compute: bf16_emulated, optimizer_moments: bf16, fp8: {recipe: deepseek_v3}}",
    "model.d_model=160",  # a tile and a part of one
    "optimizer.lr=2e-3",
    f"max_duration={LAST}ba",
    f"save_interval={SAVED_AT}ba",
    "save_num_checkpoints_to_keep=-1",
)
SHARED_EXPERTS = "mesh={shard: 2, expert: 2}"
FORWARD_NOISE = 2e-3
"""Relative: what other sums in another order do to a loss through roundings that flip."""
GRADIENT_NOISE = 0.1
"""Relative, at most: two products in a row leave 20 dB of signal over noise (tests/ops/fp8/test_layers.py)."""


@pytest.fixture(scope="module")
def whole(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run on two ranks that share the experts, never interrupted."""
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("fp8"), *FP8, SHARED_EXPERTS, "ema={decay: 0.9}"), 2)


def resumed(tiny_recipe: Tiny, run_dir: Path, start: Run, ranks: int, *changes: str) -> Run:
    load_path = f"load_path={start.run_dir / 'checkpoints' / f'ba{SAVED_AT}'}"
    return run_recipe(tiny_recipe(run_dir, *FP8, "save_interval=1000ba", load_path, *changes), ranks)


def test_it_learns(whole: Run) -> None:
    losses = list(whole.column("loss/train/lm").values())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.97 * losses[0]


def test_a_resume_on_the_same_mesh_has_the_same_bits(tiny_recipe: Tiny, tmp_path: Path, whole: Run) -> None:
    again = resumed(tiny_recipe, tmp_path, whole, 2, SHARED_EXPERTS, "ema={decay: 0.9}")
    assert again.exact() == whole.exact(SAVED_AT + 1)


@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [(1, "mesh={shard: 1}"), pytest.param(2, "mesh={replicate: 2, shard: 1}", marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_a_resume_on_another_mesh_stays_within_the_noise_of_quantization(
    tiny_recipe: Tiny, tmp_path: Path, whole: Run, ranks: int, mesh: str
) -> None:
    """The state is the same bit for bit. Each later loss may differ by the noise of a forward pass, and by the share of
    what was learned since that gradients of another noise would have learned otherwise: a step along a gradient with a
    relative error of x lowers the loss by at most x more or less, to first order."""
    expected = {batch: loss for batch, loss in whole.column("loss/train/lm").items() if batch > SAVED_AT}
    got = resumed(tiny_recipe, tmp_path, whole, ranks, mesh, "ema={decay: 0.9}").column("loss/train/lm")
    assert got.keys() == expected.keys()
    start = max(expected.values())
    for batch, loss in expected.items():
        assert abs(got[batch] - loss) <= FORWARD_NOISE * loss + GRADIENT_NOISE * (start - loss), batch
