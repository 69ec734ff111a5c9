"""FP8 weights that FSDP gathers as codes and scales, quantized once a step on the shards: docs/fp8.md.

FSDP asks the local tensor of a sharded parameter for what to gather, and gives it what was gathered (the two hooks
``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``). Here they are attributes of that plain tensor, not methods of a
subclass: optimizers, checkpoints and averages see the tensor that they always see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moefoundry.adapters import has_adapter
from moefoundry.ops.fp8 import Backend, GatheredBlocks, KeptBlocks, QuantizedTensor, Tile
from moefoundry.ops.fp8.weights import blocks_for_fprop
from moefoundry.ops.sizes import has_whole_blocks
from moefoundry.precision import Fp8Experts, Fp8FeedForward, Fp8Linear, Fp8Module


class ShardedWeight:
    """A weight whose shards are quantized, and gathered in FP8.

    Args:
        held: FSDP's record of the parameter.
        name: Name of the weight among the blocks.
        blocks: Blocks of the module that multiplies by it.
        backend: The backend that quantizes; None chooses by device.

    Attributes:
        shard: The quantized shard, until it is forgotten.
    """

    def __init__(self, held: Any, name: str, blocks: GatheredBlocks, backend: Backend | None) -> None:
        self._held, self._name, self._blocks, self._backend = held, name, blocks, backend
        self.shard = KeptBlocks()
        blocks.shards.append(self.shard)
        self.attach()
        held._init_extensions()

    @property
    def parameter(self) -> nn.Parameter:
        """The sharded parameter."""
        return self._held.sharded_param

    def attach(self) -> None:
        """Give the hooks to the local tensor, which is another one after the model was allocated or moved."""
        local: Any = self._held._sharded_local_tensor
        if getattr(local, "fsdp_pre_all_gather", None) is None:
            local.fsdp_pre_all_gather = self._before_gather
            local.fsdp_post_all_gather = self._after_gather

    def _before_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, Tensor], None]:
        key = self._name, False
        if key not in self.shard.found:
            local = self._held._sharded_local_tensor.detach()
            operand = local.to(mp_policy.param_dtype or local.dtype)
            blocks_for_fprop(operand, self.shard, self._name, self._backend)
        return self.shard.found[key].tensors, None

    def _after_gather(
        self, gathered: tuple[Tensor, Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]] | None:
        """Take the blocks, whose memory FSDP frees and allocates from now on, and give FSDP a stand-in.

        Autograd and FSDP need the parameter's shape and dtype; the blocks free its memory at their first use.
        """
        if out is not None:
            return None
        values, scales = gathered
        shape = tuple(self._held._orig_size)
        self._blocks.found[self._name, False] = QuantizedTensor(values, scales, Tile.BLOCK, shape)
        return values.new_empty(shape, dtype=dtype), ()


def gather_in_fp8(model: nn.Module) -> Iterator[ShardedWeight]:
    """Let FSDP gather weights of ``model`` in FP8 where the blocks of shards are those of the whole weight.

    So it is where every rank has whole experts, or a multiple of 128 rows. Adapters read base weights, so a model
    with adapters gathers as it did.
    """
    if has_adapter(model):
        return
    held = {(id(each._module_info.module), each._module_info.param_name): each for each in held_by_fsdp(model)}
    for module in model.modules():
        if not isinstance(module, Fp8Module):
            continue
        blocks = GatheredBlocks()
        for name, owner, parameter in _operands(module):
            each = held.pop((id(owner), parameter), None)  # a network's weights are not those of its layers as well
            if each is not None and _whole_blocks(each):
                yield ShardedWeight(each, name, blocks, _backend(module))
        if blocks.shards:
            module.keep_blocks(blocks)


def held_by_fsdp(model: nn.Module) -> Iterator[Any]:
    """Yield FSDP's own records of the parameters that it shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            yield from group.fsdp_params


def _operands(module: Fp8Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the weights that a module quantizes: their names among its blocks, and who has them by which name."""
    if isinstance(module, Fp8Linear):
        yield "weight", module, "weight"
    for name in ("gate", "up", "down"):
        if isinstance(module, Fp8FeedForward):
            yield name, getattr(module, f"{name}_proj"), "weight"
        elif isinstance(module, Fp8Experts):
            yield name, module, f"{name}_proj"


def _backend(module: Fp8Module) -> Backend | None:
    if isinstance(module, Fp8Experts):
        return module.fp8_backend
    return module.backend if isinstance(module, Fp8Linear | Fp8FeedForward) else None


def _whole_blocks(held: Any) -> bool:
    """Tell if FSDP divides a parameter into whole blocks."""
    return held.fsdp_placement.dim == 0 and has_whole_blocks(held._orig_size, held.mesh_info.shard_mesh_size)
