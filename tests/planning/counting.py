"""What ranks really send in a training step, from the operations themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.mesh import Meshes

c10d, functional = torch.ops.c10d, torch.ops._c10d_functional


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends to others, by collective and mesh axis, while the mode is on.

    Several axes may share a group, but FSDP's collectives are of one kind and the dispatcher's of another.

    Args:
        meshes: Whose groups give the axes their names.
        strict: Refuse collectives that this class does not count.
        of_optimizer: Count a step of the optimizer, whose all-to-alls go along the axes of shards.

    Attributes:
        calls, sent: By ``(collective, axis)``.
    """

    def __init__(self, meshes: Meshes, strict: bool = True, of_optimizer: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.fsdp_axes = _axes(meshes.expert_fsdp) | _axes(meshes.dense)
        self.dispatch_axes = _axes(meshes.expert)
        for hop in meshes.expert_hops or ():
            self.dispatch_axes |= _axes(hop)
        self.exchange_axes = self.fsdp_axes if of_optimizer else self.dispatch_axes
        self.calls: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is c10d._allgather_base_:
            self._add_fsdp("all_gather", args[2], lambda n: (n - 1) * args[1].nbytes)
        elif packet is c10d._reduce_scatter_base_:
            self._add_fsdp("reduce_scatter", args[2], lambda n: (n - 1) * args[0].nbytes)
        elif packet is c10d.allreduce_:
            self._add_fsdp("all_reduce", args[1], lambda n: 2 * (n - 1) * args[0][0].nbytes // n)
        elif packet is functional.all_to_all_single:
            rows, _, send, name = args
            row_bytes = rows.nbytes // max(len(rows), 1)
            own = _resolve_process_group(name).rank()
            self._add("all_to_all", self.exchange_axes[name], (sum(send) - send[own]) * row_bytes)
        elif packet is functional.all_gather_into_tensor:
            shard, size, name = args
            self._add("all_gather", self.dispatch_axes[name], (size - 1) * shard.nbytes)
        else:
            foreign = func.namespace in ("c10d", "_c10d_functional") and packet is not functional.wait_tensor
            assert not (foreign and self.strict), func
        return func(*args, **(kwargs or {}))

    def _add_fsdp(self, collective: str, boxed_group: Any, sent: Callable[[int], int]) -> None:
        group = dist.ProcessGroup.unbox(boxed_group)
        self._add(collective, self.fsdp_axes.get(group.group_name, "world"), sent(group.size()))

    def _add(self, collective: str, axis: str, sent: int) -> None:
        self.calls[collective, axis] += 1
        self.sent[collective, axis] += sent


def _axes(mesh: DeviceMesh) -> dict[str, str]:
    return {mesh.get_group(axis).group_name: axis for axis in mesh.mesh_dim_names or ()}
