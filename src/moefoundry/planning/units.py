"""Parts of a sharded model: its blocks, and the units that FSDP allocates, gathers and reduces.

FSDP divides every parameter along dim 0 into ``ceil(dim0 / shards)`` rows a rank, as ``torch.chunk`` does, so the last
ranks may have fewer rows or none (experts that are fewer than their ranks are divided along dim 1). Stored, gathered
and reduced tensors are padded to the first rank's share; optimizer state is not. So no rank has more than rank 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import prod

from moefoundry.config import Compute, PrecisionConfig
from moefoundry.mesh import EXPERT_SHARD, SHARD, MeshDegrees
from moefoundry.ops.sizes import has_whole_blocks
from moefoundry.planning.fp8_weights import block_bytes
from moefoundry.planning.weights import EXPERTS, Weight

FP32 = 4
"""Bytes of an element."""


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers and reduces together, on rank 0.

    Attributes:
        name: Name of the module; empty for the root.
        axis: The mesh axis that shards it.
        shards: Ranks that share one copy.
        copies: Number of copies.
        shard_numel: Elements of a rank's share, padded.
        full_numel: Elements of the whole; for experts, those of one ``expert`` rank.
        trained_shard_numel, trained_full_numel: Of those, the elements of parameters that train.
        param_bytes: Bytes of a gathered element.
        reduce_bytes: Bytes of an element in the reduction.
        gathers: All-gathers in a micro-batch, or in a step where they are done once.
        fp8_numel: Elements of the whole that are gathered in FP8.
        fp8_bytes: Bytes of those, with scales.
    """

    name: str
    axis: str
    shards: int
    copies: int
    shard_numel: int
    full_numel: int
    trained_shard_numel: int
    trained_full_numel: int
    param_bytes: int
    reduce_bytes: int
    gathers: int
    fp8_numel: int = 0
    fp8_bytes: int = 0

    @property
    def gathered(self) -> int:
        """Bytes of the parameters in the compute dtype or in FP8."""
        return self.full_numel * self.param_bytes - self._spared

    @property
    def gathered_share(self) -> int:
        """Bytes of a rank's share of them, padded."""
        return self.shard_numel * self.param_bytes - self._spared // self.shards

    @property
    def _spared(self) -> int:
        """Bytes by which FP8 is less than the compute dtype."""
        return self.fp8_numel * self.param_bytes - self.fp8_bytes

    @property
    def gradients(self) -> int:
        """Bytes of autograd's gradients, in the compute dtype."""
        return self.trained_full_numel * self.param_bytes

    @property
    def reduce_input(self) -> int:
        """Bytes of the input of the reduce-scatter."""
        return self.shards * self.trained_shard_numel * self.reduce_bytes


@dataclass(frozen=True)
class PlannedBlock:
    """A transformer block.

    Attributes:
        name: Name of the module, or of the multi-token-prediction module around it.
        sparse: The block has an MoE layer.
        positions: Positions of a sequence that it computes.
        linear: The block has linear attention.
        masked: Its attention takes a mask.
        weights: Elements that train on a rank before they are sharded, by the groups of
            :mod:`moefoundry.planning.stages`.
    """

    name: str
    sparse: bool
    positions: int
    linear: bool
    masked: bool
    weights: Mapping[str, int]


def compute_bytes(precision: PrecisionConfig) -> int:
    """Give the bytes of an element of activations and gathered parameters."""
    return 2 if precision.compute == Compute.bf16 else FP32


def unit_of(
    name: str,
    weights: Sequence[Weight],
    precision: PrecisionConfig,
    degrees: MeshDegrees,
    gathers: int = 2,
    in_fp8: Collection[str] = (),
) -> Unit:
    """Shard the parameters of a unit.

    Args:
        name: Name of the module; :data:`~moefoundry.planning.weights.EXPERTS` for experts that ranks divide.
        weights: Its parameters. They stay in fp32 if all of them do.
        precision: The recipe's ``precision``.
        degrees: Degrees of the mesh.
        gathers: All-gathers where several ranks share it: forward and backward, or one for both.
        in_fp8: Names of those that are multiplied in FP8, and gathered so where blocks of shards are whole.
    """
    experts = name == EXPERTS
    shards = degrees.shard // degrees.expert if experts else degrees.shard
    wide = bool(weights) and all(weight.wide_module is not None for weight in weights)
    shapes = [(weight.shape[0] // degrees.expert, *weight.shape[1:]) if experts else weight.shape for weight in weights]
    share = [_share(shape, shards, experts) for shape in shapes]
    trained = [weight.trained for weight in weights]
    fp8 = [
        shape
        for weight, shape in zip(weights, shapes, strict=True)
        if weight.name in in_fp8 and has_whole_blocks(shape, shards)
    ]
    return Unit(
        name=name,
        axis=EXPERT_SHARD if experts else SHARD,
        shards=shards,
        copies=degrees.replicate,
        shard_numel=sum(share),
        full_numel=sum(map(prod, shapes)),
        trained_shard_numel=sum(compress(share, trained)),
        trained_full_numel=sum(compress(map(prod, shapes), trained)),
        param_bytes=FP32 if wide else compute_bytes(precision),
        reduce_bytes=FP32,
        gathers=gathers if shards > 1 else 0,
        fp8_numel=sum(map(prod, fp8)),
        fp8_bytes=sum(map(block_bytes, fp8)),
    )


def divided_dim(shape: Sequence[int], ranks: int, experts: bool) -> int:
    """Give the dim along which FSDP divides a parameter; ``experts`` says that it divides a rank's experts."""
    return 1 if experts and ranks > shape[0] and shape[1] % ranks == 0 else 0


def _share(shape: Sequence[int], ranks: int, experts: bool) -> int:
    """Count the elements of a rank's share, padded."""
    dim = divided_dim(shape, ranks, experts)
    return -(-shape[dim] // ranks) * (prod(shape) // shape[dim])
