"""Initial weights that depend on the seed and each tensor's name only.

Every slice along a tensor's first dim has a random stream of its own, and a rank draws only the slices that it holds.
So the model is the same on one process and on any mesh, and no rank holds more than its shard plus one slice. Numbers
are drawn on the CPU, so that all devices agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from moefoundry.model.indexer import Indexer
from moefoundry.model.linear_attention import Decay
from moefoundry.model.norm import Norm


@torch.no_grad()
def init_weights(model: nn.Module, std: float, seed: int) -> None:
    """Fill every parameter in place: norms multiply by 1, biases and sinks are 0, matrices are from N(0, std**2).

    Buffers are filled with 0, decays of linear attention as :class:`~moefoundry.model.linear_attention.Decay` says.

    Args:
        model: Materialized (``to_empty``), sharded or not.
        std: Standard deviation.
        seed: Determines every value, together with the parameter's name.

    Raises:
        ValueError: A parameter is still on the meta device.
    """
    starts = {id(module.weight): module.start for module in model.modules() if isinstance(module, Norm)}
    starts |= {id(module.k_norm_weight): 1.0 for module in model.modules() if isinstance(module, Indexer)}
    decays = {id(module.A_log): module for module in model.modules() if isinstance(module, Decay)}
    starts |= {id(module.dt_bias): module.DT_BIAS for module in decays.values()}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: materialize the model with to_empty() first")
        if id(parameter) in starts:
            parameter.fill_(starts[id(parameter)])
        elif id(parameter) in decays:
            fill_by_row(name, parameter, seed, decays[id(parameter)].draw)
        elif parameter.dim() == 1 or name.endswith("bias"):  # stacked biases of experts have two dims
            parameter.zero_()
        else:
            fill_by_row(name, parameter, seed, lambda row, draw: row.normal_(0.0, std, generator=draw))
    for buffer in model.buffers():
        buffer.zero_()


def fill_by_row(name: str, parameter: Tensor, seed: int, fill: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Fill a parameter slice by slice along its first dim; a rank draws only the slices that it holds.

    Args:
        name: The parameter's name, which with the seed determines every value.
        parameter: Sharded or not.
        seed: Seed of the model.
        fill: Fills one slice, fp32 on the CPU, from a generator.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    rows, *others = (_owned(parameter, dim) for dim in range(parameter.dim()))
    generator = torch.Generator()
    for index, row in zip(rows, local, strict=True):
        digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little"))
        values = fill(torch.empty(parameter.shape[1:], dtype=torch.float32), generator)
        row.copy_(values[tuple(slice(part.start, part.stop) for part in others)])


def _owned(parameter: Tensor, dim: int) -> range:
    """Compute the indices along ``dim`` that this rank holds.

    If two mesh axes shard one dim, the plain ``Shard`` (experts among ranks) was applied first, and FSDP's
    ``_StridedShard`` divided the rest, in whatever order they stand in the mesh.
    """
    owned = range(parameter.shape[dim])
    if not isinstance(parameter, DTensor):
        return owned
    axes = list(enumerate(parameter.placements))
    plain = [axis for axis, placement in axes if type(placement) is Shard and placement.dim == dim]
    strided = [axis for axis, placement in axes if isinstance(placement, _StridedShard) and placement.dim == dim]
    for axis in plain + strided:
        size, rank = parameter.device_mesh.size(axis), parameter.device_mesh.get_local_rank(axis)
        step = -(-len(owned) // size)  # torch.chunk's: the last shards may be shorter, or empty
        owned = owned[rank * step : (rank + 1) * step]
    return owned
