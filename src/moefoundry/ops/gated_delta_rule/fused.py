"""The gated delta rule by the kernels of flash-linear-attention (the package ``fla``), which is optional."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

FUSED_DTYPES = (torch.bfloat16, torch.float16)


def has_fused() -> bool:
    """Tell if the kernels are installed."""
    return find_spec("fla") is not None


@torch.compiler.disable  # kernels of another package, and numbers of documents that no graph knows
def fused_delta_rule(
    q_BSGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    documents_BS: Tensor | None,
    state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`~moefoundry.ops.gated_delta_rule.gated_delta_rule` with the kernels.

    Raises:
        ImportError: The package ``fla`` is not installed.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tensors = {"q": q_BSGK, "k": k_BSGK, "v": v_BSHV, "g": log_decay_BSH, "beta": beta_BSH}
    begins = None
    if documents_BS is not None:  # one row, of sequences behind each other
        begins = _begins(documents_BS)
        tensors = {name: tensor.flatten(0, 1).unsqueeze(0) for name, tensor in tensors.items()}
    out, state = chunk_gated_delta_rule(
        **tensors,
        initial_state=state_BHKV,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=begins,
    )
    return out.view(v_BSHV.shape), state


def _begins(documents_BS: Tensor) -> Tensor:
    """List where documents begin in the flattened batch, and its end, int64."""
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    end = torch.full((1,), documents_BS.numel(), device=documents_BS.device)
    return torch.cat([begins_BS.flatten().nonzero().flatten(), end])
