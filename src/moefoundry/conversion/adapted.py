"""The weights of a checkpoint, with adapters merged into their base a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moefoundry.adapters import adapted, adapter_names, apply_lora, trained_names
from moefoundry.adapters.merge import adapted_weights
from moefoundry.checkpoint.base import base_at
from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import StoredTensors, row_ranges
from moefoundry.checkpoint.store import using
from moefoundry.checkpoint.weights import PREFIX, Weights, read_lora_config, read_model_config, stored_names
from moefoundry.config import LoraConfig
from moefoundry.conversion.tensor_map import check_tensors
from moefoundry.model.transformer import MoETransformer, meta_model


class Tensors(Protocol):
    """Tensors of a model that are read by ranges of their leading dims.

    Attributes:
        specs: Shape and dtype of each by name.
    """

    specs: dict[str, TensorSpec]

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor: ...

    def rows(self, name: str) -> Iterator[Tensor]: ...


@contextmanager
def weights_of(checkpoint: Path, weights: Weights = Weights.trained, base: str | None = None) -> Iterator[Tensors]:
    """Open the parameters and buffers of a checkpoint's model, of adapters with their base.

    Args:
        checkpoint: The checkpoint.
        weights: Values to take for the parameters; of a checkpoint of adapters, for these.
        base: Where the base of the adapters is now; None is where it was.

    Raises:
        UserError: A tensor, the average or the base is missing, or does not fit the model.
    """
    model, lora = meta_model(read_model_config(checkpoint)), read_lora_config(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with using(checkpoint), base_at(checkpoint, base) as directory:
        if lora is None or directory is None:
            ours = StoredTensors(checkpoint, PREFIX, stored_names(checkpoint, model, weights))
            check_tensors(ours.specs, shapes, checkpoint)
            yield ours
            return
        frozen = StoredTensors(directory, PREFIX)
        check_tensors(frozen.specs, shapes, directory)
        yield MergedTensors(frozen, Adapters(checkpoint, lora, model, weights))


class Adapters:
    """Adapters of a checkpoint, and what else has been trained beside them.

    Args:
        checkpoint: The checkpoint.
        lora: Its adapters' config.
        model: Its model on meta, without adapters, which it is given here.
        weights: Values to take.

    Attributes:
        names: Name of a weight -> name of the module of its adapter.
        scale: Scale of every adapter.
        beside: Names of what else has been trained: routers, and buffers.
        stored: Tensors of the checkpoint.

    Raises:
        UserError: A tensor of an adapter is missing, or has another shape.
    """

    def __init__(self, checkpoint: Path, lora: LoraConfig, model: MoETransformer, weights: Weights) -> None:
        apply_lora(model, lora)
        modules = {id(module): name for name, module in model.named_modules()}
        weights_by_id = {id(weight): name for name, weight in model.named_parameters()}
        pairs = list(adapted_weights(model))
        self.names = {weights_by_id[id(weight)]: modules[id(adapter)] for weight, adapter in pairs}
        self.scale = pairs[0].adapter.scale
        names = {name: stored_names(checkpoint, model, weights)[name] for name in trained_names(model)}
        self.stored = StoredTensors(checkpoint, PREFIX, names)
        buffers = {name for name, _ in model.named_buffers()} - self.stored.specs.keys()  # as in the base
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name in names.keys() - buffers}
        check_tensors({name: spec for name, spec in self.stored.specs.items() if name in names}, shapes, checkpoint)
        self.beside = shapes.keys() - adapter_names(model)


class MergedTensors:
    """Tensors of a base with adapters merged into them, as they are read."""

    def __init__(self, base: StoredTensors, adapters: Adapters) -> None:
        self._base = base
        self._adapters = adapters
        self.specs = base.specs

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """Read a new tensor: the whole, or the box of ``ranges`` of its leading dims."""
        stored = self._adapters.stored
        if name in self._adapters.beside:
            return stored.read(name, *ranges)
        if name not in self._adapters.names:
            return self._base.read(name, *ranges)
        limits = [*ranges, *((0, size) for size in self.specs[name].shape[len(ranges) :])]
        leading, rows, columns = limits[:-2], limits[-2], limits[-1]
        module = self._adapters.names[name]
        magnitude = f"{module}.magnitude.weight"
        merged = adapted(
            self._base.read(name, *leading, rows),
            stored.read(f"{module}.a", *leading),
            stored.read(f"{module}.b", *leading, rows),
            self._adapters.scale,
            stored.read(magnitude, rows) if magnitude in stored.specs else None,
        )
        return merged[..., slice(*columns)].to(self.specs[name].dtype)

    def rows(self, name: str) -> Iterator[Tensor]:
        """Read the tensor, a range of rows at a time."""
        if not self.specs[name].shape:
            yield self.read(name)
            return
        for rows in row_ranges(self.specs[name]):
            yield self.read(name, rows)
