"""Causal convolution of each channel by itself, over the last few tokens of its document.

Shapes: B batch, S sequence, C channels, W width of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x_BSC: Tensor, weight_C1W: Tensor, documents_BS: Tensor | None = None, before_BPC: Tensor | None = None
) -> Tensor:
    """Convolve each channel over the W - 1 tokens before a token, and the token itself.

    Args:
        x_BSC: Inputs, of the weight's dtype.
        weight_C1W: Weights of each channel, the token's own last.
        documents_BS: int64 [B, S], document of each token; a token sees none of another. None is one document a row.
        before_BPC: The W - 1 inputs before these; None is zeros.

    Returns:
        [B, S, C].
    """
    width = weight_C1W.shape[-1]
    if documents_BS is None:
        before_BPC = x_BSC.new_zeros(len(x_BSC), width - 1, x_BSC.shape[2]) if before_BPC is None else before_BPC
        padded_BCL = torch.cat([before_BPC, x_BSC], dim=1).transpose(1, 2)
        return F.conv1d(padded_BCL, weight_C1W, groups=len(weight_C1W)).transpose(1, 2)
    assert before_BPC is None, "a row that goes on is one document"
    out_BSC = x_BSC * weight_C1W[:, 0, -1]
    for distance in range(1, min(width, x_BSC.shape[1])):
        same_BS1 = (documents_BS[:, distance:] == documents_BS[:, :-distance]).unsqueeze(-1)
        earlier_BSC = F.pad(x_BSC[:, :-distance] * same_BS1, (0, 0, distance, 0))
        out_BSC = out_BSC + earlier_BSC * weight_C1W[:, 0, -1 - distance]
    return out_BSC
