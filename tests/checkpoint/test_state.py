"""What a checkpoint holds: tensors under the single process's names, and generators exactly."""

import random
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from moefoundry.checkpoint.manifest import Manifest
from moefoundry.checkpoint.save import write
from moefoundry.checkpoint.state import (
    RunState,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
    to_jsonable,
    trained_tensors,
)
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
    parameters = trained_tensors(model)
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
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    slots = optimizer_tensors(model, optimizer)
    assert len(slots) == 9
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_tensors(model).items())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    assert all(parameter.grad is None for parameter in model.parameters())


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), random.gauss(), np.random.rand(), np.random.randn()]


@pytest.mark.parametrize("pending", [0, 1])
def test_generators_come_back_exactly(pending: int) -> None:
    """Also where a generator holds the second value of a pair."""
    random.seed(5)
    np.random.seed(5)
    for _ in range(pending):
        np.random.randn()
        random.gauss()
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


class Averages:
    """Of one parameter."""

    def __init__(self, value: float) -> None:
        self.average = torch.full((4, 3), value)
        self.restarted = False

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"ema/0.weight": self.average}

    def restart(self) -> None:
        self.restarted = True


class Data:
    """A position in an epoch."""

    position = 0

    def state_dict(self, samples: int, from_beginning: bool) -> dict[str, int]:
        return {"sample_in_epoch": samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["sample_in_epoch"]


def run_of(seed: int, averages: Averages | None) -> tuple[RunState, SimpleNamespace]:
    """The state of a run that has trained 3 batches of 2 samples, and Composer's part of it."""
    from composer.core import Timestamp

    model, optimizer = trained()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed)
    timestamp = Timestamp(batch=3, sample=6, batch_in_epoch=3, sample_in_epoch=6, total_wct=timedelta(seconds=1.5))
    state = SimpleNamespace(
        model=model,
        optimizers=[optimizer],
        timestamp=timestamp,
        train_dataloader=SimpleNamespace(dataset=Data()),
        dataset_resumption={},
    )
    mesh = {"replicate": 1, "shard": 1, "expert": 1}
    return RunState({"seed": seed}, mesh, {"data": "1234"}, averages, lambda: {"loss": 2.5}), state


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], list[float]]:
    """A checkpoint, its tensors, and the numbers that the generators give next."""
    run, state = run_of(1, Averages(5.0))
    tensors = {name: tensor.clone() for name, tensor in run.tensors(state).items()}
    write(tmp_path, tensors, run.document(state), run.origin(3))
    return tmp_path, tensors, draw()


def test_everything_that_is_saved_comes_back(saved: tuple[Path, dict[str, torch.Tensor], list[float]]) -> None:
    directory, tensors, drawn = saved
    kinds = {name.partition("/")[0] for name in tensors}
    assert kinds == {"model", "optimizer", "ema", "rng"}
    origin = Manifest.read(directory).origin
    assert (origin.batch, origin.world_size, origin.metrics) == (3, 1, {"loss": 2.5})
    run, state = run_of(2, averages := Averages(0.0))
    state.timestamp = state.timestamp.copy(batch=0, sample=0, sample_in_epoch=0)
    seconds = run.load(state, directory, weights_only=False)
    assert set(seconds) == {"store", "exchange", "optimizer"}
    here = {name: tensor for name, tensor in run.tensors(state).items() if not name.startswith("rng")}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in here.items())
    assert not averages.restarted
    assert (state.timestamp.batch.value, state.timestamp.total_wct) == (3, timedelta(seconds=1.5))
    assert state.train_dataloader.dataset.position == 6
    assert draw() != drawn, "not before the first batch"
    run.restore_generators()
    assert draw() == drawn
    run.restore_generators()
    assert draw() != drawn, "once"


def test_weights_alone_leave_the_rest_as_it_is(saved: tuple[Path, dict[str, torch.Tensor], list[float]]) -> None:
    directory, tensors, _ = saved
    run, state = run_of(2, Averages(0.0))
    state.timestamp = state.timestamp.copy(batch=0)
    before = {name: tensor.clone() for name, tensor in optimizer_tensors(state.model, state.optimizers[0]).items()}
    for tensor in before.values():
        tensor += 1
    for name, tensor in optimizer_tensors(state.model, state.optimizers[0]).items():
        tensor.copy_(before[name])
    run.load(state, directory, weights_only=True)
    here = run.tensors(state)
    assert all(torch.equal(here[name], tensors[name]) for name in here if name.startswith(("model", "ema")))
    assert all(torch.equal(here[name], before[name]) for name in before)
    assert (state.timestamp.batch.value, state.train_dataloader.dataset.position) == (0, 0)


def test_averages_begin_anew_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    run, state = run_of(1, None)
    write(tmp_path, run.tensors(state), run.document(state), run.origin(3))
    run, state = run_of(2, averages := Averages(0.0))
    run.load(state, tmp_path, weights_only=False)
    assert averages.restarted


def test_a_checkpoint_without_the_value_that_gauss_keeps_is_loaded(tmp_path: Path) -> None:
    """As earlier versions saved them: there was none, else they could not save."""
    random.seed(5)
    run, state = run_of(1, None)
    tensors = {name: tensor for name, tensor in run.tensors(state).items() if name != "rng/0/python_gauss"}
    write(tmp_path, tensors, run.document(state), run.origin(3))
    drawn = draw()
    assert random.getstate()[2] is not None
    run, state = run_of(2, None)
    run.load(state, tmp_path, weights_only=False)
    run.restore_generators()
    assert draw() == drawn
