"""Which function mixes a layer's experts when all of them are on this rank.

A mixture takes tokens, their top-k weights, the three stacked weights and the order of rows, and gives each token's
weighted sum of its experts; it has no rows to hand around, so it may keep far less. None stands for the plain way,
which works everywhere: rows in expert order, three grouped products, a sum over each token's rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefoundry.config import ExpertBackend
from moefoundry.ops.expert_mixture import PAYS_FROM_BYTES, expert_mixture
from moefoundry.ops.permute import RowOrder

Mixture = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, RowOrder], Tensor]
"""``(tokens_TD, weights_TK, gate_EFD, up_EFD, down_EDF, order) -> [T, D]``."""


def choose_mixture(backend: ExpertBackend, tokens_TD: Tensor, top_k: int, hidden_size: int) -> Mixture | None:
    """Choose by device, dtype and size.

    Args:
        backend: ``auto`` takes what is fastest there, ``triton`` its kernels or an error, others the plain way.
        tokens_TD: That it would mix.
        top_k: Experts of each.
        hidden_size: F.

    Raises:
        ValueError: Triton's kernels are asked for and cannot run there.
    """
    if backend == ExpertBackend.auto and tokens_TD.device.type == "cpu":
        pays = tokens_TD.dtype == torch.float32 and tokens_TD.nbytes * top_k >= PAYS_FROM_BYTES
        return expert_mixture if pays else None
    if backend not in (ExpertBackend.auto, ExpertBackend.triton):
        return None
    from moefoundry.ops.fused_experts import fused_experts, obstacle

    found = obstacle(tokens_TD, hidden_size)
    if found and backend == ExpertBackend.triton:
        raise ValueError(f"model.moe.backend: triton cannot run: {found}; use model.moe.backend=auto")
    return None if found else fused_experts
