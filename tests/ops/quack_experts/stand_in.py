"""A stand-in for the package ``quack-kernels``: signatures and demands of QuACK 0.6.5, arithmetic by PyTorch.

Products and epilogues are computed in the dtype of their operands, or fp32 if that is wider, and rounded once. A demand
that is not met is an assertion.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.permute import RowOrder, sum_of_rows


@dataclass(frozen=True)
class GemmConfig:
    tile_m: int = 128
    tile_n: int = 192
    tile_k: int | None = None
    num_warps: int | None = None
    pingpong: bool = True
    is_dynamic_persistent: bool = True
    cluster_m: int = 2
    cluster_n: int = 1
    cluster_k: int = 1
    split_k: int = 1
    swap_ab: bool = False
    max_swizzle_size: int = 8
    device_capacity: int = 9
    use_tma_gather: bool = False


def gemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out_quant_dim: int = -1,
    out_transposed: bool = False,
    out_per_tensor_scale: float | None = None,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
    batch_idx_permute: Tensor | None = None,
    dynamic_scheduler: bool = False,
    tuned: bool = True,
    rounding_mode: int = 0,
    sr_seed: int = 0,
    concat_layout: tuple[str, ...] | None = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> Tensor:
    assert not tuned, "tuning measures on a GPU, again for every number of rows"
    found = _product(A, B, cu_seqlens_m, cu_seqlens_k, A_idx, concat_layout or ()).to(A.dtype)
    if out is None:
        return found
    _check(out)
    if concat_layout and "out" in concat_layout:
        dim = _other_dim(out)
        found = torch.cat([found.transpose(dim, 0)[half::2].transpose(dim, 0) for half in (0, 1)], dim=dim)
    assert out.shape == found.shape
    return out.copy_(found)


def gemm_gated(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    alpha: float = 1.0,
    preact_out: Tensor | None = None,
    postact_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    postact_dtype: torch.dtype | None = None,
    cu_seqlens_m: Tensor | None = None,
    A_idx: Tensor | None = None,
    store_preact: bool = True,
    dynamic_scheduler: bool = False,
    tuned: bool = True,
    config: GemmConfig | None = None,
    concat_layout: tuple[str, ...] | None = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    assert not tuned
    assert activation == "swiglu"
    pairs = _product(A, B, cu_seqlens_m, None, A_idx, concat_layout or ())
    hidden = (F.silu(pairs[:, ::2]) * pairs[:, 1::2]).to(A.dtype)
    return pairs.to(A.dtype), hidden if postact_out is None else postact_out.copy_(hidden)


def gemm_dgated(
    A: Tensor,
    B: Tensor,
    PreAct: Tensor,
    activation: str | None = None,
    dx_out: Tensor | None = None,
    postact_out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    postact_dtype: torch.dtype | None = None,
    colvec_scale: Tensor | None = None,
    colvec_reduce: bool = False,
    cu_seqlens_m: Tensor | None = None,
    A_idx: Tensor | None = None,
    dynamic_scheduler: bool = True,
    tuned: bool = True,
    config: GemmConfig | None = None,
    split_k: int | None = 1,
    split_k_mode: int = 0,
) -> tuple[Tensor, ...]:
    assert config is not None, "without one, it is tuned"
    assert not dynamic_scheduler, "it cannot gather"
    assert not config.is_dynamic_persistent, "it cannot gather"
    assert activation == "swiglu"
    assert colvec_scale is not None
    assert colvec_scale.dtype == torch.float32
    _check(PreAct)
    grad, (gate, up) = _product(A, B, cu_seqlens_m, None, A_idx, ()), (PreAct[:, half::2] for half in (0, 1))
    gate, up = gate.to(grad.dtype), up.to(grad.dtype)
    scale = colvec_scale.unsqueeze(1).to(grad.dtype)
    sigmoid = torch.sigmoid(gate)
    hidden = gate * sigmoid * up
    of_gate = grad * scale * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_pairs = torch.stack([of_gate, grad * scale * gate * sigmoid], dim=2).flatten(1)
    found = of_pairs.to(A.dtype), (hidden * scale).to(A.dtype)
    return (*found, (hidden * grad).sum(1).float()) if colvec_reduce else found


def _product(
    A: Tensor,
    B: Tensor,
    cu_seqlens_m: Tensor | None,
    cu_seqlens_k: Tensor | None,
    A_idx: Tensor | None,
    concat_layout: tuple[str, ...],
) -> Tensor:
    """[rows, N] with groups of rows, [E, M, N] with groups along K; ``A_idx`` gathers along what has groups."""
    starts = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
    assert starts is not None
    assert starts.dtype == torch.int32
    assert A_idx is None or A_idx.dtype == torch.int32
    for operand in (A, B):
        _check(operand)
    if "B" in concat_layout:
        B = _interleaved(B)
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B, parts = A.to(wide), B.to(wide), list(zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True))
    if cu_seqlens_k is None:
        A = A if A_idx is None else A[A_idx]
        return torch.cat([A[start:end] @ of_expert for (start, end), of_expert in zip(parts, B, strict=True)])
    A = A if A_idx is None else A[:, A_idx]
    return torch.stack([A[:, start:end] @ B[start:end] for start, end in parts])


def _check(operand: Tensor) -> None:
    """One stride is 1, and the others are whole 16 bytes."""
    assert 1 in operand.stride()[-2:]
    for stride in operand.stride():
        assert stride == 1 or stride % 8 == 0, operand.stride()


def _other_dim(operand: Tensor) -> int:
    """The one of the last two dimensions that is not contiguous."""
    return operand.dim() - (2 if operand.stride(-1) == 1 else 1)


def _interleaved(operand: Tensor) -> Tensor:
    """Let the two halves of the dimension that is not contiguous take turns."""
    dim = _other_dim(operand)
    return operand.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def package() -> dict[str, ModuleType]:
    """Make the modules that ``import quack`` is to find, by name."""
    package, interface, config = (ModuleType(name) for name in ("quack", "quack.gemm_interface", "quack.gemm_config"))
    package.__spec__ = ModuleSpec("quack", None)
    interface.__dict__.update(gemm=gemm, gemm_gated=gemm_gated, gemm_dgated=gemm_dgated)
    config.GemmConfig = GemmConfig
    return {module.__name__: module for module in (package, interface, config)}


def sum_rows(rows_ND: Tensor, order: RowOrder, row_weights_N: Tensor | None = None) -> Tensor:
    """What the kernel of that name computes."""
    weighted_ND = rows_ND if row_weights_N is None else rows_ND * row_weights_N.unsqueeze(1)
    return sum_of_rows(weighted_ND, order).to(rows_ND.dtype)
