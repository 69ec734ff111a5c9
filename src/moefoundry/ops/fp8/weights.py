"""Quantized weights, which a step needs several times: in each micro-batch, forward and backward.

Fprop sums over the columns of a weight [O, I], and Dgrad over its rows. Tensor cores of compute capability 9.0 read FP8
with the summed dimension last. So kernels get a second, transposed copy of the same blocks for Dgrad; plain PyTorch
gets a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.fp8.backend import QUANTIZER_CAPABILITY, Backend, choose_backend
from moefoundry.ops.fp8.formats import QuantizedTensor, Tile
from moefoundry.ops.fp8.quantization import quantize, quantize_transposed


class KeptBlocks:
    """Quantized weights of one module, by name, until they are forgotten.

    Whoever gives one to a layer forgets them when the weights change: nothing here can tell, as FSDP and fused
    optimizers change values without a count.

    Attributes:
        found: Blocks by the weight's name, straight and transposed.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, bool], QuantizedTensor] = {}

    def forget(self) -> None:
        """Free all; the next use quantizes anew."""
        self.found.clear()

    def get(self, name: str, weight: Tensor, transposed: bool, backend: Backend | None) -> QuantizedTensor:
        """Find blocks that were kept, or quantize ``weight`` and keep them."""
        key = name, transposed
        if key not in self.found:
            with torch.inference_mode(False), torch.no_grad():  # training may use what an evaluation has made
                make = quantize_transposed if transposed else _straight
                self.found[key] = make(weight.detach(), backend=backend)
        return self.found[key]

    def enter(self) -> None:
        """Note a layer's forward pass that a backward pass will follow."""

    def leave(self) -> None:
        """Note the end of a layer's backward pass."""


class BlocksOfPass(KeptBlocks):
    """Blocks that the chunks of one pass through experts share.

    Whoever makes them forgets them after the forward pass. The backward pass makes them again for its first chunk, and
    forgets them after its last.
    """

    def __init__(self) -> None:
        super().__init__()
        self._chunks = 0

    def enter(self) -> None:
        self._chunks += 1

    def leave(self) -> None:
        self._chunks -= 1
        if self._chunks <= 0:
            self.forget()


class GatheredBlocks(KeptBlocks):
    """Blocks that FSDP gathers, and whose memory it frees: there are none to forget.

    A weight that is gathered in another dtype is quantized in each pass.

    Attributes:
        shards: This rank's shards, kept between passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shards: list[KeptBlocks] = []

    def forget(self) -> None:
        """Keep all; FSDP fills them anew."""

    def get(self, name: str, weight: Tensor, transposed: bool, backend: Backend | None) -> QuantizedTensor:
        gathered = self.found.get((name, False))
        if gathered is None:
            return quantize_transposed(weight, backend=backend) if transposed else _straight(weight, backend)
        weight.untyped_storage().resize_(0)  # nobody reads it
        return gathered.transposed() if transposed else gathered


def blocks_for_fprop(
    weight: Tensor, kept: KeptBlocks | None = None, name: str = "", backend: Backend | None = None
) -> QuantizedTensor:
    """Quantize ``weight`` [..., O, I] in blocks, as :func:`~moefoundry.ops.fp8.fprop` takes it.

    Args:
        weight: float32, bfloat16 or float16.
        kept: Blocks that may have been quantized before, and that stay; None keeps nothing.
        name: Name of the weight among them.
        backend: The backend to use; None chooses by device.
    """
    return _straight(weight, backend) if kept is None else kept.get(name, weight, False, backend)


def blocks_for_dgrad(
    weight: Tensor, kept: KeptBlocks | None = None, name: str = "", backend: Backend | None = None
) -> QuantizedTensor:
    """Quantize ``weight`` as :func:`blocks_for_fprop` does, and transpose it: Dgrad is Fprop with these blocks."""
    if not transposes(weight.device, backend):
        return blocks_for_fprop(weight, kept, name, backend).mT
    return quantize_transposed(weight, backend=backend) if kept is None else kept.get(name, weight, True, backend)


def transposes(device: torch.device, backend: Backend | None = None) -> bool:
    """Tell if Dgrad takes a copy of a weight, not a view."""
    return choose_backend(device, QUANTIZER_CAPABILITY, backend) is Backend.TRITON


def _straight(weight: Tensor, backend: Backend | None) -> QuantizedTensor:
    return quantize(weight, Tile.BLOCK, backend=backend)
