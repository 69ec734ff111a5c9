"""The state of a run, as a checkpoint holds it: tensors by name, and a small JSON document.

Tensors carry the names of the single-process model whatever the mesh, so any mesh can read them:

    model/{parameter}             parameters, those that train where there are adapters; and persistent buffers
    optimizer/{parameter}/{slot}  exp_avg, exp_avg_sq, step
    ema/{parameter}               moving average, where the recipe has ``ema``
    rng/{rank}/{generator}        generator state of each rank: torch, cuda, numpy, python

A checkpoint of adapters names the one that has the other parameters (``base.py``), and a resume reads both.
Nothing else is stored as a tensor and nothing at all as a pickle: hyperparameters come from the recipe, positions and
counters are JSON. The state of Python's and NumPy's generators is packed into integer tensors for that reason. A
schedule has no state: the learning rate follows from the recipe and the position.
"""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moefoundry.adapters import adapter_names, start_magnitudes
from moefoundry.checkpoint.base import Base
from moefoundry.checkpoint.load import Index, load, read_index
from moefoundry.checkpoint.manifest import BASE, Origin, read_state, recipe_digest
from moefoundry.checkpoint.ranks import on_rank_zero, rank
from moefoundry.config import UserError

if TYPE_CHECKING:
    from composer.core import State

INDEXER = ".attention.indexer."


class Averages(Protocol):
    """Averages of the parameters: :class:`moefoundry.callbacks.ema.Ema`."""

    def tensors(self) -> dict[str, Tensor]: ...

    def restart(self) -> None: ...


@dataclass
class RunState:
    """Everything of a run that is saved and put back: model, averages of it, optimizer, generators, position.

    Attributes:
        recipe: The run's recipe, flat; a reader compares the model with its own.
        mesh: Degrees of its axes, by name.
        data_digests: Digests of the run's data.
        averages: Averages of the parameters; None without ``ema``.
        metrics: Gives the metrics of this batch that decide which checkpoints are kept, by name.
        base: Checkpoint of the parameters that adapters leave as they are; None without adapters.
        source_tokens: Tokens of each source of the training data so far.
    """

    recipe: dict[str, Any]
    mesh: Mapping[str, int]
    data_digests: Mapping[str, str]
    averages: Averages | None = None
    metrics: Callable[[], Mapping[str, float]] = dict
    base: Base | None = None
    source_tokens: dict[str, int] = field(default_factory=dict)
    _generators: dict[str, Tensor] = field(default_factory=dict)  # to be put back when the first batch is read

    def __post_init__(self) -> None:
        self._world_size = self.mesh["replicate"] * self.mesh["shard"]
        self._digest = recipe_digest(self.recipe)

    def tensors(self, state: State) -> dict[str, Tensor]:
        """Collect the tensors of a checkpoint, sharing memory with the run where that is possible."""
        return {
            **self.held_tensors(state.model),
            **optimizer_tensors(state.model, state.optimizers[0]),
            **rng_tensors(rank()),
            **(self.averages.tensors() if self.averages else {}),
        }

    def held_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """List the parameters of the model, without those of the base, and its buffers, sharing memory with it."""
        if self.base is not None:
            return trained_tensors(model)
        return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}

    def document(self, state: State) -> dict[str, Any]:
        """Make ``state.json``, the same on every rank."""
        assert state.train_dataloader is not None, "training has begun"
        data = state.train_dataloader.dataset.state_dict(state.timestamp.sample_in_epoch.value, True)
        return {
            "timestamp": to_jsonable(state.timestamp.state_dict()),
            "lr": state.optimizers[0].param_groups[0]["lr"],
            "data": {**data, "epoch": state.timestamp.epoch.value},
            "data_digests": dict(self.data_digests),
            "source_tokens": dict(self.source_tokens),
            "world_size": self._world_size,
            "recipe": self.recipe,
            **({BASE: self.base.document()} if self.base else {}),
        }

    def origin(self, batch: int) -> Origin:
        """Say where the checkpoint of this batch comes from."""
        return Origin(batch, self.mesh, self._world_size, self._digest, self.metrics())

    def load(self, state: State, checkpoint: Path, weights_only: bool) -> dict[str, float]:
        """Put a saved state back, or its weights and averages alone; every rank calls it.

        A buffer that the checkpoint lacks, such as the expert bias of a softmax router, starts as in any new run. A
        rank that the checkpoint knows gets its own generators; any further rank gets new ones, derived from the seed,
        the batch and the rank. They come into force with :meth:`restore_generators`.

        Returns:
            Seconds that each part took, by name.

        Raises:
            UserError: As :func:`moefoundry.checkpoint.load.load`.
        """
        seconds: dict[str, float] = {}
        if self.base is not None:
            begun = time.perf_counter()
            _load_base(state.model, self.base.checkpoint)
            seconds["base"] = time.perf_counter() - begun
            if checkpoint == self.base.checkpoint:
                if self.averages:
                    self.averages.restart()
                return seconds
        document, index = on_rank_zero(lambda: read_state(checkpoint)), read_index(checkpoint)
        tensors = _stored_or_new(self.held_tensors(state.model), index, state.model)
        averaged = any(name.startswith("ema/") for name in index.tensors)
        if self.averages and averaged:
            tensors |= self.averages.tensors()
        own: dict[str, Tensor] = {}
        if not weights_only:
            begun = time.perf_counter()
            tensors |= optimizer_tensors(state.model, state.optimizers[0])
            seconds["optimizer"] = time.perf_counter() - begun
            if rank() < document["world_size"]:
                own = {name: tensor for name, tensor in rng_tensors(rank()).items() if name in index.tensors}
                self._generators = own
            else:
                seed, batch = int(self.recipe["seed"]), document["timestamp"]["batch"]
                self._generators = derived_rng_tensors(rank(), seed, batch)
        report = load(index, tensors, own)
        if self.averages and not averaged:
            self.averages.restart()
        if not weights_only:
            _restore_position(state, document)
            self.source_tokens |= document.get("source_tokens", {})
        return {"store": report.store_seconds, "exchange": report.exchange_seconds, **seconds}

    def restore_generators(self) -> None:
        """Put the loaded generators back, once."""
        if self._generators:
            restore_rng(self._generators, rank())
            self._generators = {}


def _restore_position(state: State, document: Mapping[str, Any]) -> None:
    """Let training and its data go on where they were."""
    timestamp = document["timestamp"]
    seconds = {key: datetime.timedelta(seconds=value) for key, value in timestamp.items() if key.endswith("_wct")}
    state.timestamp.load_state_dict({**timestamp, **seconds})
    assert state.train_dataloader is not None, "set before AFTER_LOAD"
    state.train_dataloader.dataset.load_state_dict(document["data"])
    state.dataset_resumption["train"] = True


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List the parameters of the model that train, and its buffers, sharing memory with it."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _load_base(model: nn.Module, checkpoint: Path) -> None:
    """Load all but the adapters."""
    adapters = adapter_names(model)
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items() if name not in adapters}
    index = read_index(checkpoint)
    load(index, _stored_or_new(tensors, index, model))
    start_magnitudes(model)


def _stored_or_new(tensors: Mapping[str, Tensor], index: Index, model: nn.Module) -> dict[str, Tensor]:
    """Leave out what a checkpoint lacks and a run may begin anew: buffers, and indexers if it has none."""
    new = {f"model/{name}" for name, _ in model.named_buffers()}
    indexers = {name for name in tensors if INDEXER in name}
    new |= set() if any(name in index.tensors for name in indexers) else indexers
    return {name: tensor for name, tensor in tensors.items() if name in index.tensors or name not in new}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """List the optimizer's state, sharing memory with it; state of a fresh optimizer is allocated first.

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
    """Copy the states of this rank's generators, with the second values of pairs of which one was drawn."""
    _, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray), "legacy=True gives a tuple"
    assert name == "MT19937", "NumPy's generator is in an unusual state"
    states = {
        "torch": torch.random.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"rng/{rank}/{generator}": state for generator, state in states.items()}


def derived_rng_tensors(rank: int, seed: int, batch: int) -> dict[str, Tensor]:
    """Derive generators for a rank that the checkpoint does not have, other ones for each seed, batch and rank."""
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
    has_pending, pending = tensors.get(f"rng/{rank}/python_gauss", torch.zeros(2)).tolist()  # earlier ones lack it
    random.setstate((3, tuple(states["python"].tolist()), pending if has_pending else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    if f"rng/{rank}/cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng/{rank}/cuda"])


def to_jsonable(state: dict[str, Any]) -> dict[str, Any]:
    """Turn the time deltas of a Composer ``Timestamp.state_dict()`` into seconds."""
    return {key: value.total_seconds() if hasattr(value, "total_seconds") else value for key, value in state.items()}
