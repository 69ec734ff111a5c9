"""What a checkpoint holds: tensors under the single process's names, and generators exactly."""

import random
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn

from moefoundry.checkpoint.state import model_tensors, optimizer_tensors, restore_rng, rng_tensors, to_jsonable
from moefoundry.config import UserError


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_tensors_have_names_and_share_memory() -> None:
    model, optimizer = trained()
    parameters = model_tensors(model)
    assert parameters.keys() == {"model/0.weight", "model/0.bias", "model/1.weight"}
    slots = optimizer_tensors(model, optimizer)
    names = {"0.weight", "0.bias", "1.weight"}
    assert slots.keys() == {f"optimizer/{name}/{slot}" for name in names for slot in ("exp_avg", "exp_avg_sq", "step")}
    parameters["model/0.bias"].fill_(9.0)
    slots["optimizer/0.bias/exp_avg"].fill_(8.0)
    assert (model[0].bias == 9.0).all()
    assert (optimizer.state[model[0].bias]["exp_avg"] == 8.0).all()


def test_a_fresh_optimizer_gets_state_without_changing_anything() -> None:
    model, _ = trained()
    before = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    slots = optimizer_tensors(model, optimizer)
    assert len(slots) == 9
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_tensors(model).items())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    assert all(parameter.grad is None for parameter in model.parameters())


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand(), np.random.randn()]


def test_generators_come_back_exactly() -> None:
    np.random.randn()  # leaves the second value of a pair in the generator
    saved = rng_tensors(rank=3)
    assert all(name.startswith("rng/3/") for name in saved)
    expected = [draw() for _ in range(3)]
    restore_rng(saved, rank=3)
    assert [draw() for _ in range(3)] == expected


def test_time_is_stored_in_seconds() -> None:
    state = {"batch": 3, "total_wct": timedelta(minutes=1, milliseconds=500)}
    assert to_jsonable(state) == {"batch": 3, "total_wct": 60.5}


def test_an_optimizer_that_keeps_other_than_tensors_is_named() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"seen": 3}
    with pytest.raises(UserError, match=r"^optimizer: SGD keeps seen as int, and checkpoints hold .* as tensors$"):
        optimizer_tensors(model, optimizer)
