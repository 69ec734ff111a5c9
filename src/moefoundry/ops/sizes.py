"""Sizes that memory, traffic and work depend on, apart from the operations: plans read them without torch."""

from __future__ import annotations

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time (:mod:`moefoundry.ops.cross_entropy`)."""

INDEXER_QUERIES = 128
"""Queries whose distributions over the keys exist at a time, where an indexer learns
(:mod:`moefoundry.model.indexer`)."""

DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule."""

TILE = 128
"""Elements that share a scale in FP8."""

SENT_ALIGNMENT = 16
"""Bytes that kernels read of a sent FP8 row at a time."""


def num_tiles(elements: int) -> int:
    """Count the FP8 tiles along a dimension; the last may be short."""
    return -(-elements // TILE)


def row_bytes(columns: int) -> int:
    """Compute the bytes of a sent FP8 row of ``columns`` values (:mod:`moefoundry.ops.fp8.wire`)."""
    return -(-(columns + num_tiles(columns)) // SENT_ALIGNMENT) * SENT_ALIGNMENT
