"""Orthogonalization of matrices by Newton-Schulz iterations in BF16 (Keller Jordan, "Muon", 2024).

An iteration maps every singular value s of X to a s + b s**3 + c s**5 and keeps the singular vectors. The coefficients
are those of ``torch.optim.Muon``: they raise small singular values fastest, and five iterations bring those of a matrix
of Frobenius norm 1 to about 0.7 to 1.2 where they were not tiny.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefoundry.ops.matrices import ITERATIONS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
"""Least norm by which a matrix is divided; a matrix of zeros stays zero."""


def orthogonalize(x: Tensor) -> Tensor:
    """Bring all singular values near 1.

    On a CPU a matrix has the bits of ``torch.optim.Muon``, alone and in any stack: there the products of a stack, which
    are no faster, would round in another way than those of one matrix.

    Args:
        x: BF16 [R, C], or a stack [N, R, C]; not changed.

    Returns:
        BF16, of the same shape.
    """
    if x.dim() == 3 and not x.is_cuda:
        return torch.stack([_iterate(matrix, torch.addmm) for matrix in x])
    return _iterate(x, torch.addmm if x.dim() == 2 else torch.baddbmm)


def _iterate(x: Tensor, multiply_add: Callable[..., Tensor]) -> Tensor:
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        gram = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, gram, x, beta=a)
    return x.mT if tall else x
