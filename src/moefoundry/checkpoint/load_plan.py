"""Plan a load: which bytes of which files fill which boxes of which tensors, and which rank reads each file.

The plan follows from what a checkpoint holds and from the boxes that ranks want. No file is opened and no rank is
asked, so every rank makes the same plan by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

from moefoundry.checkpoint.format import Box, FileRange, StoredTensor


class Need(NamedTuple):
    """A box, part of a stored shard, that a rank wants."""

    rank: int
    box: Box


class ShardRead(NamedTuple):
    """A stored shard that is read, and the boxes of it that ranks need."""

    box: Box
    place: FileRange
    needs: Sequence[Need]


class TensorLoad(NamedTuple):
    """Reads of one tensor.

    Attributes:
        name: Name in the checkpoint.
        dtype: Stored dtype.
        boxes: Box that each rank wants.
        reads: Stored shards that make up these boxes.
    """

    name: str
    dtype: torch.dtype
    boxes: Mapping[int, Box]
    reads: Sequence[ShardRead]


class LoadPlan(NamedTuple):
    """A load of all ranks, tensor by tensor in this order.

    Attributes:
        tensors: Reads of each tensor.
        readers: File -> the one rank that reads it, and sends others what they need of it.
    """

    tensors: Sequence[TensorLoad]
    readers: Mapping[str, int]


def plan_load(stored: Mapping[str, StoredTensor], wanted: Mapping[str, Mapping[int, Box]]) -> LoadPlan:
    """Plan the load of boxes of tensors.

    Args:
        stored: Tensors of the checkpoint by name.
        wanted: Name of a tensor -> rank -> the box of it that the rank wants.

    Raises:
        ValueError: The stored shards do not make up what is wanted.
    """
    tensors = []
    for name, boxes in wanted.items():
        spec, shards = stored[name]
        needs = _overlaps(tuple(shards), tuple(boxes.items()))
        reads = [ShardRead(box, place, need) for (box, place), need in zip(shards.items(), needs, strict=True) if need]
        found = sum(need.box.numel for read in reads for need in read.needs)
        if found != sum(box.numel for box in boxes.values()):
            raise ValueError(f"a part of {name} is in no file")
        tensors.append(TensorLoad(name, spec.dtype, boxes, reads))
    return LoadPlan(tensors, _choose_readers(read for tensor in tensors for read in tensor.reads))


def first_copy(shape: tuple[int, ...], ranks: Tensor, placements: Sequence[Placement]) -> dict[int, Box]:
    """Map each rank that comes first along every axis on which a tensor is copied to its box.

    Args:
        shape: Shape of the whole tensor.
        ranks: int [axis, axis, ...], the ranks of its mesh.
        placements: Placement along each axis.
    """
    copied = (placement.is_replicate() for placement in placements)
    axes = [range(1 if copy else size) for size, copy in zip(ranks.shape, copied, strict=True)]
    boxes = {}
    for coordinate in product(*axes):
        sizes, offsets = _compute_local_shape_and_global_offset(shape, ranks.shape, list(coordinate), placements)
        boxes[int(ranks[coordinate])] = Box.at(offsets, sizes)
    return boxes


@lru_cache(maxsize=256)
def _overlaps(shards: tuple[Box, ...], boxes: tuple[tuple[int, Box], ...]) -> list[list[Need]]:
    """List, for each shard, what each rank needs of it. Layers have the same shapes, so most answers are known."""
    needs: list[list[Need]] = [[] for _ in shards]
    if not shards:
        return needs
    ranks = [rank for rank, _ in boxes]
    there, here = np.array(shards, np.int64), np.array([box for _, box in boxes], np.int64)
    first = np.maximum(there[:, None, 0], here[None, :, 0])
    last = np.minimum(there[:, None, 1], here[None, :, 1])
    for shard, box in np.argwhere((first < last).all(-1)).tolist():
        needs[shard].append(Need(ranks[box], Box(tuple(first[shard, box].tolist()), tuple(last[shard, box].tolist()))))
    return needs


def _choose_readers(reads: Iterable[ShardRead]) -> dict[str, int]:
    """Choose for each file the rank that needs most of it; of several, the one with the least to read."""
    values: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for read in reads:
        for need in read.needs:
            values[read.place.file][need.rank] += need.box.numel
    readers: dict[str, int] = {}
    load: dict[int, int] = defaultdict(int)
    for file, ranks in sorted(values.items()):
        most = max(ranks.values())
        reader = min((rank for rank, count in ranks.items() if count == most), key=lambda rank: (load[rank], rank))
        load[reader] += sum(ranks.values())
        readers[file] = reader
    return readers
