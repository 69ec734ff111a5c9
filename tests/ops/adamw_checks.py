"""The checks of ``test_adamw_kernel.py``: run in Triton's interpreter by a process of its own, or on a GPU here."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

from moefoundry import optim
from moefoundry.optim import Bf16MomentsAdamW

SIZES = {"one block": (64, 64), "several and a part": (4096 + 3,), "small": (5,)}
STEPS = 3


def train(device: str, by_kernel: bool, seed: int | None) -> dict[str, Tensor]:
    """Parameters and moments after some steps, in the second of which one has no gradient."""
    draw = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(size, generator=draw).to(device)) for name, size in SIZES.items()}
    pairs = list(parameters.items())
    groups = [{"params": pairs[:1], "weight_decay": 0.1}, {"params": pairs[1:], "weight_decay": 0.0}]
    optimizer = Bf16MomentsAdamW(groups, 1e-2, (0.9, 0.95), 1e-8, seed)
    with mock.patch.object(optim, "_has_kernel", return_value=by_kernel):
        for step in range(STEPS):
            for name, parameter in parameters.items():
                gradient = torch.randn(parameter.shape, generator=draw).to(device)
                parameter.grad = None if (step, name) == (1, "small") else gradient
            optimizer.step()
    moments = {f"{name} {slot}": optimizer.state[p][slot] for name, p in pairs for slot in ("exp_avg", "exp_avg_sq")}
    return {name: parameter.detach() for name, parameter in pairs} | moments


def check_equal_to_operators(device: str, seed: int | None) -> None:
    """Parameters to fp32's rounding; moments too, but for the few that this rounds the other way."""
    found, expected = (train(device, by_kernel, seed) for by_kernel in (True, False))
    for name, tensor in found.items():
        other = expected[name]
        assert tensor.dtype == other.dtype, name
        if tensor.dtype == torch.bfloat16:
            differ = tensor != other
            assert differ.float().mean() < 2e-3, f"{name}: {int(differ.sum())}"
            torch.testing.assert_close(tensor[differ], other[differ], rtol=2**-7, atol=1e-30)
        else:
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-5)


def check_rounding_of_what_is_not_finite(device: str) -> None:
    """A gradient that is infinite or NaN makes the moments so, whatever the bits."""
    from moefoundry.ops.adamw_kernel import Update, update_

    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 0.0], device=device)
    parameter, moments = torch.zeros(5, device=device), torch.zeros(2, 5, dtype=torch.bfloat16, device=device)
    update_(parameter, values, *moments, Update(1e-2, 0.0, 0.0, 1e-8, 0.0), 0, counter=2**32 - 2)
    assert moments[0].tolist()[:2] == [torch.inf, -torch.inf]
    assert moments[:, 2].isnan().all()
    assert moments[0].tolist()[3:] == [1.0, 0.0]
