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
    with mock.patch.object(optim, "kernels_run", return_value=by_kernel):
        for step in range(STEPS):
            for name, parameter in parameters.items():
                gradient = torch.randn(parameter.shape, generator=draw).to(device)
                parameter.grad = None if (step, name) == (1, "small") else gradient
            optimizer.step()
    moments = {f"{name} {slot}": optimizer.state[p][slot] for name, p in pairs for slot in ("exp_avg", "exp_avg_sq")}
    return {name: parameter.detach() for name, parameter in pairs} | moments


def check_equal_to_operators(device: str, seed: int | None) -> None:
    """The same but for the few moments that another last bit of fp32 rounds the other way, and their parameters."""
    found, expected = (train(device, by_kernel, seed) for by_kernel in (True, False))
    for name, tensor in found.items():
        other = expected[name]
        assert tensor.dtype == other.dtype, name
        far = ~tensor.isclose(other, rtol=0 if tensor.dtype == torch.bfloat16 else 1e-5, atol=1e-7)
        assert far.float().mean() < 2e-3, f"{name}: {int(far.sum())}"
        torch.testing.assert_close(tensor[far], other[far], rtol=2**-7, atol=1e-4)


def check_what_is_not_finite(device: str) -> None:
    """Moments of a gradient that is infinite or NaN are NaN, whatever the random bits; others are not touched."""
    from moefoundry.ops.adamw_kernel import Update, update_

    gradient = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 0.0], device=device)
    for counter in (None, 2**32 - 2):
        parameter, moments = torch.zeros(5, device=device), torch.zeros(2, 5, dtype=torch.bfloat16, device=device)
        update_(parameter, gradient, *moments, Update(1e-2, 0.5, 0.5, 1e-8, 0.0), 0, counter)
        assert moments[:, :3].isnan().all()
        assert moments[:, 3:].tolist() == [[0.5, 0.0]] * 2
        assert parameter[3:].tolist() == [torch.tensor(-1e-2).item(), 0.0]
