"""``model.moe.backend: quack`` in a whole model, on a stand-in for QuACK: losses and gradients are those of the loop.

On a mesh, with micro-batches and activation checkpointing; ``tests/ops/quack_experts`` has its arithmetic.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import run_distributed
from tests.moe.test_megablocks_backend import assert_equal, losses_and_gradients


def on_the_stand_in(*case: Any) -> dict[str, Tensor]:
    """The same with QuACK, on a CPU and in fp32, rows summed by PyTorch."""
    from moefoundry.ops import quack_experts
    from moefoundry.ops.fused_experts import launches
    from tests.ops.quack_experts import stand_in

    sys.modules |= stand_in.package()
    quack_experts.obstacle, launches.sum_rows = lambda *_: "", stand_in.sum_rows
    return losses_and_gradients("quack", *case)


@pytest.mark.parametrize(
    ("mesh", "capacity_factor"), [((1, 2, 2), None), pytest.param(None, 1.0, marks=pytest.mark.slow)]
)
def test_a_model_trains_as_with_the_loop(mesh: tuple[int, int, int] | None, capacity_factor: float | None) -> None:
    (expected,) = run_distributed(losses_and_gradients, 1, "loop", None, 1, capacity_factor)
    ranks = mesh[0] * mesh[1] if mesh else 1
    for got in run_distributed(on_the_stand_in, ranks, mesh, 2 if mesh else 1, capacity_factor):
        assert_equal(got, expected)
