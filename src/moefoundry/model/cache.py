"""Tensors that attention keeps of earlier tokens, so that generation runs each token through the model once.

    grouped-query  keys [B, Hkv, L, d] after RoPE, values [B, Hkv, L, d]
    latent         compressed keys and values [B, L, R], and the rotated part of the keys, which all heads share,
                   [B, 1, L, d]; beside them the keys of an indexer, [B, L, d]
    linear         the last inputs of the convolution, [B, W - 1, C], and the state [B, H, K, V]

A block with a sliding window keeps only the tokens that the next one sees. All rows of the batch have the same length,
and each row is one document from its first token.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Tensors of one attention layer.

    Attributes:
        tensors: Of softmax attention [..., L, width] each, which grow; of linear attention those above, which it
            replaces. Empty before the first token.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self._beside: LayerCache | None = None

    @property
    def beside(self) -> LayerCache:
        """The cache of what chooses keys in the same layer."""
        self._beside = self._beside or LayerCache()
        return self._beside

    def append(self, *new: Tensor, window: int | None = None) -> tuple[Tensor, ...]:
        """Append new tokens, and return all that any of them sees.

        Args:
            new: [..., S, width] each, with the same S.
            window: Tokens that a token sees, itself included; those that no later one sees are dropped. None keeps all.
        """
        pairs = zip(self.tensors, new, strict=True)
        whole = tuple(torch.cat(pair, dim=-2) for pair in pairs) if self.tensors else new
        self.tensors = whole if window is None else tuple(_last(tensor, window - 1) for tensor in whole)
        return whole


def _last(tensor: Tensor, tokens: int) -> Tensor:
    kept = min(tokens, tensor.shape[-2])
    return tensor.narrow(-2, tensor.shape[-2] - kept, kept)


class KVCache:
    """One :class:`LayerCache` for each block; ``model(input_ids, cache=cache)`` continues after its tokens.

    Attributes:
        layers: A cache for each block.
        length: Number of tokens that every layer has; the model counts them.
    """

    def __init__(self, n_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.length = 0
