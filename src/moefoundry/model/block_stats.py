"""Losses and statistics that a block gives beside its output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moefoundry.moe.layer import RoutingStats


class BlockStats(NamedTuple):
    """Losses and statistics of one block in one micro-batch.

    Attributes:
        routing: Of its experts; None if it has none.
        indexer_kl: Scalar, mean over tokens of the divergence of its indexer's choice; None unless that learns.
    """

    routing: RoutingStats | None = None
    indexer_kl: Tensor | None = None

    def weighted(self, weight: Tensor) -> BlockStats:
        """Multiply the losses by a scalar."""
        routing, kl = self.routing, self.indexer_kl
        return BlockStats(
            None if routing is None else routing.weighted(weight), None if kl is None else kl * weight.to(kl.dtype)
        )
