"""Initial weights that depend on the seed and each tensor's own name, and on nothing else.

Every slice along a tensor's first dim has a random stream of its own, so a rank that holds some of the slices draws
just those: the same model comes out on one process and on any mesh, and no rank ever holds more than its shard plus
one slice. Streams are drawn on the CPU, so devices agree too.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moefoundry.model.norm import RMSNorm


@torch.no_grad()
def init_weights(model: nn.Module, std: float, seed: int) -> None:
    """Fill every parameter in place: norm weights with 1, biases with 0, matrices from N(0, std**2).

    Args:
        model: Materialized (``to_empty``), sharded or not.
        std: Standard deviation.
        seed: With the parameter's name it determines every value.

    Raises:
        ValueError: A parameter is still on the meta device.
    """
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: materialize the model with to_empty() first")
        if id(parameter) in norms:
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            _fill_normal(name, parameter, std, seed)


def _fill_normal(name: str, parameter: Tensor, std: float, seed: int) -> None:
    local, rows, columns = _owned(parameter)
    generator = torch.Generator()
    row_shape = parameter.shape[1:]
    for index, row in zip(rows, local, strict=True):
        digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little"))
        values = torch.empty(row_shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        row.copy_(values[columns])


def _owned(parameter: Tensor) -> tuple[Tensor, range, tuple[slice, ...]]:
    """The local part of a parameter, which first-dim slices it holds, and which part of each slice."""
    if not isinstance(parameter, DTensor):
        return parameter, range(parameter.shape[0]), ()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local()
    columns = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
    return local, range(offset[0], offset[0] + local.shape[0]), columns
