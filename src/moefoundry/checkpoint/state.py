"""What a checkpoint holds: tensors by name, and a small JSON document.

Tensors carry the names of the single-process model whatever the mesh, so any mesh can read them:

    model/{parameter}             parameters and persistent buffers
    optimizer/{parameter}/{slot}  exp_avg, exp_avg_sq, step
    ema/{parameter}               moving average, where the recipe has ``ema``
    rng/{rank}/{generator}        generator state of each rank: torch, cuda, numpy, python

Nothing else is stored as a tensor and nothing at all as a pickle: hyperparameters come from the recipe, positions and
counters are JSON. The state of Python's and NumPy's generators is packed into integer tensors for that reason.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moefoundry.config import UserError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model, sharing memory with it."""
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, sharing memory with it; state of a fresh optimizer is allocated first.

    Raises:
        UserError: The optimizer keeps something else than tensors.
    """
    if not optimizer.state:
        _allocate_state(optimizer)
    for slots in optimizer.state.values():
        for slot, value in slots.items():
            if not isinstance(value, Tensor):
                kind = f"{type(optimizer).__name__} keeps {slot} as {type(value).__name__}"
                raise UserError(f"optimizer: {kind}, and checkpoints hold what an optimizer keeps as tensors")
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer/{names[parameter]}/{slot}": tensor
        for parameter, slots in optimizer.state.items()
        for slot, tensor in slots.items()
    }


def _allocate_state(optimizer: Optimizer) -> None:
    """Let the optimizer make its own state, by a step that changes nothing: zero gradients, zero learning rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """This rank's generators, as copies."""
    _, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray), "legacy=True gives a tuple"
    assert (name, gauss) == ("MT19937", None), "a generator is in an unusual state"
    states = {
        "torch": torch.random.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"rng/{rank}/{generator}": state for generator, state in states.items()}


def derived_rng_tensors(rank: int, seed: int, batch: int) -> dict[str, Tensor]:
    """Generators for a rank that the checkpoint does not have: other numbers for each seed, batch and rank."""
    words = [int(word) for word in np.random.SeedSequence([seed, batch, rank]).generate_state(3)]
    before = rng_tensors(rank)
    torch.manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[2])
    derived = rng_tensors(rank)
    restore_rng(before, rank)
    return derived


def restore_rng(tensors: dict[str, Tensor], rank: int) -> None:
    """Put this rank's generators into the state that :func:`rng_tensors` took."""
    states = {
        generator: tensors[f"rng/{rank}/{generator}"] for generator in ("torch", "python", "numpy", "numpy_gauss")
    }
    torch.random.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    if f"rng/{rank}/cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng/{rank}/cuda"])


def to_jsonable(state: dict[str, Any]) -> dict[str, Any]:
    """A Composer ``Timestamp.state_dict()`` with its time deltas as seconds."""
    return {key: value.total_seconds() if hasattr(value, "total_seconds") else value for key, value in state.items()}
