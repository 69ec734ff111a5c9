"""The tensors of a model in the terms of another that computes the same (``families/equivalents.py``)."""

from __future__ import annotations

from torch import Tensor, zeros

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.conversion.families.equivalents import Equivalent
from moefoundry.conversion.tensor_map import Source
from moefoundry.model.transformer import meta_model


class EquivalentTensors:
    """Tensors of the other model, as they are read.

    Args:
        tensors: Tensors of the model.
        same: The other model.

    Attributes:
        specs: Shapes and dtypes by name; a tensor that is added has the embedding's dtype.
    """

    def __init__(self, tensors: Source, same: Equivalent) -> None:
        self._tensors = tensors
        self._factor = same.factor
        dtype = tensors.specs["embed_tokens.weight"].dtype
        self.specs = {
            name: tensors.specs.get(name, TensorSpec(tuple(tensor.shape), dtype))
            for name, tensor in meta_model(same.cfg).state_dict().items()
        }

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """Read a new tensor: the whole, or the box of ``ranges`` of its leading dims."""
        if name not in self._tensors.specs:
            limits = [*ranges, *((0, size) for size in self.specs[name].shape[len(ranges) :])]
            return zeros([stop - start for start, stop in limits], dtype=self.specs[name].dtype)
        values = self._tensors.read(name, *ranges)
        factor = self._factor(name)
        return values if factor == 1.0 else values * factor
