"""The kernel of AdamW with BF16 moments against torch's operators: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moefoundry import optim
from moefoundry.config import AdamWConfig, Moments
from moefoundry.optim import Bf16MomentsAdamW, build_adamw
from tests.model.tiny import tiny_config, tiny_model
from tests.ops import adamw_checks as checks

pytest.importorskip("triton", reason="triton is not installed")

SEEDS = pytest.mark.parametrize("seed", [None, 17], ids=["nearest", "stochastic"])


@SEEDS
def test_interpreted(interpreter: ProcessPoolExecutor, seed: int | None) -> None:
    interpreter.submit(checks.check_equal_to_operators, "cpu", seed).result()


def test_what_is_not_finite_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_what_is_not_finite, "cpu").result()


@pytest.mark.gpu
@SEEDS
def test_on_a_gpu(seed: int | None) -> None:
    checks.check_equal_to_operators("cuda", seed)
    checks.check_what_is_not_finite("cuda")


def test_one_launch_a_parameter_with_bf16_moments_and_one_operator_a_group_without() -> None:
    """Stacked experts are one parameter."""
    from moefoundry.ops import adamw_kernel

    model = tiny_model(tiny_config())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    cfg = AdamWConfig(lr=1e-2)
    narrow, wide = build_adamw(model, cfg, Moments.bf16_stochastic), build_adamw(model, cfg)
    with (
        mock.patch.object(optim, "kernels_run", return_value=True),
        mock.patch.object(adamw_kernel, "update_") as launch,
    ):
        narrow.step()
    assert launch.call_count == len(list(model.parameters()))
    with MovedBytes() as moved:
        wide.step()
    assert moved.updates == len(wide.param_groups) == 2


class MovedBytes(TorchDispatchMode):
    """Bytes that operators read and write, views aside, and how many were updates by torch's AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.updates = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.overloadpacket.__name__:
            written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if func.overloadpacket.__name__ == "_fused_adamw_":  # in place: all are read, all but gradients written
                written, read = [*args[0], *args[2], *args[3]], [*args[0], *args[1], *args[2], *args[3]]
                self.updates += 1
            self.bytes += sum(t.nbytes for t in [*written, *read])
        return out


@pytest.mark.parametrize(("seed", "least"), [(None, 50), (17, 200)])
def test_operators_move_many_times_the_bytes_of_the_kernel(seed: int | None, least: int) -> None:
    """20 bytes an element: fp32 parameter and both moments read and written, the gradient read."""
    weight = torch.nn.Parameter(torch.zeros(2**16))
    optimizer = Bf16MomentsAdamW([{"params": [("weight", weight)]}], 1e-2, (0.9, 0.95), 1e-8, seed)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with MovedBytes() as moved:
        optimizer.step()
    assert moved.bytes / weight.numel() >= least > 2 * 20
    kernel = (
        2 * weight.nbytes
        + weight.grad.nbytes
        + 2 * sum(optimizer.state[weight][slot].nbytes for slot in ("exp_avg", "exp_avg_sq"))
    )
    assert kernel / weight.numel() == 20
