"""The average that a thread keeps, against a float64 reference that does all in turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moefoundry.callbacks import ema
from moefoundry.callbacks.ema import Ema, ParameterAverage
from moefoundry.config import EmaConfig

DECAY = 0.999


def relative_error(values: list[Tensor], expected: list[Tensor]) -> float:
    got, wanted = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (values, expected))
    return ((got - wanted).norm() / wanted.norm()).item()


def test_two_thousand_steps_of_training_equal_the_float64_reference() -> None:
    """The rate decays to nothing, so that the last updates are the smallest that fp32 has to add up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs, targets = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    shards = [parameter.detach() for parameter in model.parameters()]
    first = [shard.clone() for shard in shards]
    expected = [shard.double() for shard in shards]
    average = ParameterAverage(shards, DECAY)
    for _ in range(2000):
        (model(inputs) - targets).square().mean().backward()
        average.release()
        optimizer.step()
        average.update(shards)
        scheduler.step()
        optimizer.zero_grad()
        expected = [DECAY * value + (1 - DECAY) * shard.double() for value, shard in zip(expected, shards, strict=True)]
    average.wait()
    assert relative_error(average.values, expected) < 1e-5
    assert relative_error(first, expected) > 0.1
    assert relative_error(shards, expected) > 0.01
    average.close()


def test_on_a_cpu_the_thread_has_no_team_of_its_own() -> None:
    """A second one would slow every operator of the training down."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    average = ParameterAverage([torch.zeros(4)], DECAY)
    assert average._thread.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2
    average.close()
    torch.set_num_threads(before)


class Held(ParameterAverage):
    """Its updates begin when they are let go."""

    def __init__(self, tensors: list[Tensor], decay: float) -> None:
        super().__init__(tensors, decay)
        self.let_go = threading.Event()

    def _move(self, tensors: list[Tensor]) -> None:
        assert self.let_go.wait(10)
        super()._move(tensors)


def test_by_hand_and_beside_the_caller() -> None:
    """4 -> 0.75 * 4 + 0.25 * 8. The update has not begun when ``update`` returns; ``release`` waits for it."""
    tensor = torch.tensor([4.0])
    average = Held([tensor], 0.75)
    tensor.fill_(8.0)
    average.update([tensor])
    assert average.values[0].item() == 4.0
    threading.Timer(0.05, average.let_go.set).start()
    average.release()
    tensor.fill_(1e9)
    average.wait()
    assert average.values[0].item() == 5.0
    average.restart([torch.tensor([2.0])])
    assert average.values[0].item() == 2.0
    average.close()


def test_an_update_waits_for_the_one_before() -> None:
    """1 -> 0.5 * 1 + 0.5 * 3 = 2 -> 0.5 * 2 + 0.5 * 4."""
    average = Held([torch.tensor([1.0])], 0.5)
    average.update([torch.tensor([3.0])])
    threading.Timer(0.05, average.let_go.set).start()
    average.update([torch.tensor([4.0])])
    average.wait()
    assert average.values[0].item() == 3.0
    average.close()


def test_exchanged_twice_is_as_it_was() -> None:
    tensor = torch.randn(3)
    average = ParameterAverage([tensor], DECAY)
    value, before = average.values[0].mul_(1 / 3).clone(), tensor.clone()
    average.exchange([tensor])
    assert torch.equal(tensor, value)
    assert torch.equal(average.values[0], before)
    average.exchange([tensor])
    assert torch.equal(tensor, before)
    assert torch.equal(average.values[0], value)
    average.close()


def test_a_skipped_step_leaves_the_average_alone() -> None:
    """1 -> 0.5 * 1 + 0.5 * 3 = 2, and once more to 2.5 if it moved."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    callback, state = Ema(EmaConfig(decay=0.5)), SimpleNamespace(model=model)
    callback.init(state, None)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.weight.grad = torch.ones(1, 1)
    callback.batch_end(state, None)
    assert callback.tensors()["ema/weight"].item() == 2.0
    model.weight.grad = None
    callback.batch_end(state, None)
    assert callback.tensors()["ema/weight"].item() == 2.0
    callback.close(state, None)


def test_what_ends_the_thread_ends_the_training() -> None:
    average = ParameterAverage([torch.zeros(2)], DECAY)
    average.update([torch.zeros(3)])
    with pytest.raises(RuntimeError, match="size"):
        average.release()
    average.wait()
    average.close()


@pytest.mark.gpu
def test_a_gpu_goes_on_while_its_parameters_are_copied() -> None:
    """Long kernels are queued before and after: ``update`` and ``release`` return before the GPU gets to either."""
    tensor = torch.zeros(1 << 20, device="cuda")
    average = ParameterAverage([tensor], 0.5)
    expected = 0.0
    for value in (1.0, 2.0, 3.0):
        torch.cuda._sleep(100_000_000)
        tensor.fill_(value)
        average.update([tensor])
        average.release()
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the host did not wait for the GPU"
        tensor.fill_(-1.0)
        expected = 0.5 * (expected + value)
    average.wait()
    assert isinstance(average._staging, ema._Staging)
    assert all(copy.is_pinned() for copy in average._staging.copies)
    assert (average.values[0] == expected).all()
    average.close()
