"""Padding: positions at the end of a row whose document number is -1.

Padding is neither routed nor counted: an MoE layer takes the real tokens out of the batch, and computes with these
alone. So losses, capacity and counts are those of the sequences without padding. Real tokens do not attend to padding,
which comes after them. A *depth* is the number of tokens that a module of multi-token prediction looks ahead, 0 for the
main model: a token counts there if the one that many places after it is real, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def count_at_depths(sequence_id_BS: Tensor, depths: int) -> Tensor:
    """Count the real tokens of a batch at depths 0, 1, .. ``depths`` - 1, int64 [depths]."""
    return torch.stack([(sequence_id_BS[:, depth:] >= 0).sum() for depth in range(depths)])


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of a micro-batch that may have padding.

    Attributes:
        sequence_id_BS: int64 [B, S], document of each position, -1 on padding.
        tokens_of_rows: Real tokens of each row, known to the host, which so waits for nothing.
    """

    sequence_id_BS: Tensor
    tokens_of_rows: Sequence[int]

    @classmethod
    def of(cls, sequence_id_BS: Tensor, tokens_of_rows: Sequence[int] | None) -> RealTokens:
        """Make them from documents; if ``tokens_of_rows`` is None, the host counts them, and waits for a GPU."""
        if tokens_of_rows is None:
            tokens_of_rows = (sequence_id_BS >= 0).sum(dim=1).tolist()
        return cls(sequence_id_BS, tokens_of_rows)

    def places(self, depth: int = 0) -> Tensor | None:
        """Find the tokens of a depth, int64 [T], ascending places in the flattened batch [B, S - depth].

        None if they are all.
        """
        ahead_BS = self.sequence_id_BS[:, depth:]
        num_tokens = sum(max(tokens - depth, 0) for tokens in self.tokens_of_rows)
        if num_tokens == ahead_BS.numel():
            return None
        return (ahead_BS >= 0).flatten().nonzero_static(size=num_tokens).flatten()

    def shares(self, tokens_per_sample: Tensor) -> Tensor:
        """Divide the tokens of each depth by what as many samples of the global batch have in the mean, [depths].

        Args:
            tokens_per_sample: float64 [depths], mean number of tokens of a sample of the global batch.
        """
        own = count_at_depths(self.sequence_id_BS, len(tokens_per_sample))
        expected = tokens_per_sample * len(self.sequence_id_BS)
        return torch.where(expected > 0, own / expected, 0.0)
