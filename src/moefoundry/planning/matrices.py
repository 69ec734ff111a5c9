"""Weight matrices that Muon updates (:mod:`moefoundry.muon`), as rank 0 of a mesh has them.

No rank owns more of them, computes more or sends more than rank 0: it has the first rows of every matrix that is
divided, and in each exchange the largest as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from moefoundry.mesh import EXPERT_SHARD, SHARD, MeshDegrees
from moefoundry.ops.matrices import is_matrix, largest_first, orthogonalization_flops, rows_of_ranks
from moefoundry.planning.units import divided_dim
from moefoundry.planning.weights import Weight

BF16 = 2
"""Bytes of an element of a row that is sent."""


@dataclass(frozen=True)
class Exchanges:
    """Exchanges of matrices' rows among the ranks of an axis, in an optimizer step.

    Attributes:
        axis: Mesh axis.
        number: Number of times that as many matrices as there are ranks are exchanged, there and back.
        sent: Bytes that rank 0 sends to others in all of them.
        flops: FLOPs of its orthogonalizations in them.
    """

    axis: str
    number: int
    sent: int
    flops: int


@dataclass(frozen=True)
class Matrices:
    """Matrices of rank 0.

    Attributes:
        owned: Elements of its shares.
        flops: FLOPs of orthogonalizing those that it has whole, in a step.
        exchanges: Exchanges of the rows of others.
    """

    owned: int
    flops: int
    exchanges: Sequence[Exchanges]


def matrices_of(weights: Iterable[tuple[Weight, int]], degrees: MeshDegrees) -> Matrices:
    """Divide the matrices of a model, of which each weight comes with the number of its equals."""
    owned = flops = 0
    ranks_of = {SHARD: degrees.shard, EXPERT_SHARD: degrees.shard // degrees.expert}
    divided: dict[str, Counter[tuple[int, int]]] = {axis: Counter() for axis in ranks_of}
    for weight, times in weights:
        if not weight.trained or not is_matrix(weight.name, weight.shape):
            continue
        experts = weight.of_experts and degrees.expert > 1
        axis = EXPERT_SHARD if experts else SHARD
        *stack, rows, columns = weight.shape
        stack = [number // degrees.expert if experts else number for number in stack]
        if ranks_of[axis] > 1 and divided_dim((*stack, rows, columns), ranks_of[axis], experts) == len(stack):
            divided[axis][rows, columns] += times * prod(stack)
            owned += times * prod(stack) * rows_of_ranks(rows, ranks_of[axis])[0] * columns
        else:
            number = times * -(-prod(stack) // ranks_of[axis])
            flops += number * orthogonalization_flops(rows, columns)
            owned += number * rows * columns
    return Matrices(
        owned, flops, [_exchanges(axis, shapes, ranks_of[axis]) for axis, shapes in divided.items() if shapes]
    )


def _exchanges(axis: str, shapes: Counter[tuple[int, int]], ranks: int) -> Exchanges:
    """Deal matrices to the ranks of an axis in turn; rank 0 has the first of each exchange."""
    own = sorted(shapes.elements(), key=largest_first)[::ranks]
    first = {(rows, columns): rows_of_ranks(rows, ranks)[0] * columns for rows, columns in shapes}
    there = sum(number * first[shape] for shape, number in shapes.items()) - sum(first[shape] for shape in own)
    back = sum(prod(shape) - first[shape] for shape in own)
    return Exchanges(axis, len(own), BF16 * (there + back), sum(orthogonalization_flops(*shape) for shape in own))
