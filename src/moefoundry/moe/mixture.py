"""How a layer's experts are mixed: the backends, and the one place that chooses between them.

A mixture takes tokens, their top-k weights, the three stacked weights and the order of this rank's rows, and gives each
token's weighted sum of its experts. It has no rows to hand around, so it may keep far less than the plain way, which
works everywhere: rows in expert order, three grouped products, a sum over each token's rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefoundry.config import ExpertBackend, MoEConfig, UserError
from moefoundry.ops.expert_mixture import PAYS_FROM_BYTES, expert_mixture
from moefoundry.ops.grouped_linear import GroupedLinear, grouped_linear, grouped_linear_loop
from moefoundry.ops.permute import RowOrder

PRODUCTS: dict[ExpertBackend, GroupedLinear] = {
    backend: grouped_linear_loop if backend == ExpertBackend.loop else grouped_linear for backend in ExpertBackend
}
"""The grouped product of each backend's plain way."""

Mixture = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, RowOrder], Tensor]
"""``(tokens_TD, weights_TK, gate_EFD, up_EFD, down_EDF, order) -> [T, D]``."""


def choose_mixture(backend: ExpertBackend, tokens_TD: Tensor, num_rows: int, hidden_size: int) -> Mixture | None:
    """Choose by device, dtype and size; None is the plain way.

    Args:
        backend: ``auto`` takes what has been measured to be fastest there, ``triton`` and ``megablocks`` their kernels
            or an error, others the plain way.
        tokens_TD: That it would mix.
        num_rows: N.
        hidden_size: F.

    Raises:
        ValueError: Kernels are asked for and cannot run there.
    """
    if backend == ExpertBackend.auto and tokens_TD.device.type == "cpu":
        bytes_of_rows = num_rows * tokens_TD.shape[1] * tokens_TD.itemsize
        return expert_mixture if tokens_TD.dtype == torch.float32 and bytes_of_rows >= PAYS_FROM_BYTES else None
    if backend == ExpertBackend.triton:
        from moefoundry.ops.fused_experts import fused_experts as mixture
        from moefoundry.ops.fused_experts import obstacle
    elif backend == ExpertBackend.megablocks:
        from moefoundry.ops.block_sparse import block_sparse_experts as mixture
        from moefoundry.ops.block_sparse import obstacle
    else:
        return None
    if found := obstacle(tokens_TD, hidden_size):
        raise ValueError(f"model.moe.backend: {backend} cannot run: {found}; use model.moe.backend=auto")
    return mixture


def check_backend(cfg: MoEConfig, d_model: int, device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that the backend which a recipe asks for runs where it is to run.

    Args:
        cfg: Says the backend.
        d_model: D.
        device: Of the tokens.
        dtype: They are multiplied in.

    Raises:
        UserError: It does not.
    """
    tokens_TD = torch.empty(1, d_model, device=device, dtype=dtype)
    try:
        choose_mixture(cfg.backend, tokens_TD, cfg.top_k, cfg.expert_hidden_size)
    except ValueError as error:
        raise UserError(str(error)) from None
