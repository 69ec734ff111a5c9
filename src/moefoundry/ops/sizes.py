"""Sizes that memory, traffic and work depend on, apart from the operations: plans read them without torch."""

from __future__ import annotations

from collections.abc import Sequence

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time (:mod:`moefoundry.ops.cross_entropy`)."""

KERNEL_CHUNK_TOKENS = 4 * CHUNK_TOKENS
"""The same where a kernel computes the loss: it makes no fp32 copy of narrow logits."""

INDEXER_QUERIES = 128
"""Queries whose distributions over the keys exist at a time, where an indexer learns
(:mod:`moefoundry.model.indexer`)."""

DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule."""

TILE = 128
"""Elements that share a scale in FP8."""

SENT_ALIGNMENT = 16
"""Bytes that kernels read of a sent FP8 row at a time."""

REDUCTIONS = 2
"""Reductions of gradients by FSDP that may be under way on a rank. With one, FSDP's default, a block's backward pass
stands still behind its experts until their gradients are reduced, as its router is the next unit. With two it goes on
through the attention, and the experts' buffer is free before the next block needs one."""


def num_tiles(elements: int) -> int:
    """Count the FP8 tiles along a dimension; the last may be short."""
    return -(-elements // TILE)


def row_bytes(columns: int) -> int:
    """Compute the bytes of a sent FP8 row of ``columns`` values (:mod:`moefoundry.ops.fp8.wire`)."""
    return -(-(columns + num_tiles(columns)) // SENT_ALIGNMENT) * SENT_ALIGNMENT


def has_whole_blocks(shape: Sequence[int], ranks: int) -> bool:
    """Tell if each of several ranks has the same number of whole blocks of a weight that they divide along dim 0."""
    return ranks > 1 and shape[0] % (ranks * (TILE if len(shape) == 2 else 1)) == 0
