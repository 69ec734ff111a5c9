"""The gated delta rule, a chunk of tokens at a time (arXiv 2412.06464, section 3.3).

Inside a chunk that begins with the state S, what token i adds to the state is ``k_i u_i``, and the u solve a triangular
system (the UT transform):

    u_i = beta_i (v_i - d_i k_i S - sum over j < i of d_ij (k_i . k_j) u_j)

with d_i the decay from the chunk's beginning to i, and d_ij that from j to i. So only the state goes from chunk to
chunk. Where a row holds several documents, d_ij is 0 between documents, and d_i for those that the state knows not.

Beside the letters of the package: R = H / G, N chunks of C tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.sizes import DELTA_CHUNK

EPS = 1e-6  # added to the square of a length, as in flash-linear-attention


class _Decays(NamedTuple):
    """Decays of a chunk, as factors.

    Attributes:
        between: [B, G, R, N, C, C], from a token (last dim) to one after it, or to itself; 0 to those before it.
        since_begin: [B, G, R, N, C], from the state at the chunk's beginning to each token.
        until_end: [B, G, R, N, C], from each token to the chunk's end.
        whole: [B, G, R, N], from the beginning to the end.
    """

    between: Tensor
    since_begin: Tensor
    until_end: Tensor
    whole: Tensor


def chunked_delta_rule(
    q_BSGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    documents_BS: Tensor | None,
    state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`~moefoundry.ops.gated_delta_rule.gated_delta_rule` in fp32 or wider."""
    wide = torch.promote_types(v_BSHV.dtype, torch.float32)
    (batch, seq_len, heads, width), key_heads = v_BSHV.shape, k_BSGK.shape[2]
    chunk, groups = min(DELTA_CHUNK, seq_len), (key_heads, heads // key_heads)
    q, k = (_chunks(_unit(x.to(wide)), chunk, (key_heads, 1)) for x in (q_BSGK, k_BSGK))
    q = q * q.shape[-1] ** -0.5
    v, beta = (_chunks(x.to(wide), chunk, groups) for x in (v_BSHV, beta_BSH))
    decays = _decays(_chunks(log_decay_BSH.to(wide), chunk, groups), _documents(documents_BS, chunk))

    strengths = (k @ k.mT) * decays.between * beta.unsqueeze(-1)
    read_k = k * decays.since_begin.unsqueeze(-1)
    right = torch.cat([v, read_k], dim=-1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(strengths, right, upper=False, unitriangular=True)
    new_v, read_k = solved.split([width, k.shape[-1]], dim=-1)

    read_q = q * decays.since_begin.unsqueeze(-1)
    kept_k = k * decays.until_end.unsqueeze(-1)
    state = v.new_zeros(batch, *groups, k.shape[-1], width)
    if state_BHKV is not None:
        state = state_BHKV.to(wide).unflatten(1, groups)
    added, read = [], []
    for index in range(v.shape[3]):
        added.append(new_v[:, :, :, index] - read_k[:, :, :, index] @ state)
        read.append(read_q[:, :, :, index] @ state)
        state = state * decays.whole[..., index, None, None] + kept_k[:, :, :, index].mT @ added[-1]
    out = torch.stack(read, dim=3) + (q @ k.mT) * decays.between @ torch.stack(added, dim=3)
    out_BSHV = out.permute(0, 3, 4, 1, 2, 5).flatten(1, 2).flatten(2, 3)[:, :seq_len]
    return out_BSHV.to(v_BSHV.dtype), state.flatten(1, 2)


uncompiled = torch.compiler.disable(chunked_delta_rule)
"""For several chunks: a graph for each number of them would take minutes to compile."""


def _chunks(x: Tensor, chunk: int, groups: tuple[int, int]) -> Tensor:
    """[B, S, G * R, ...] -> [B, G, R, N, C, ...]; zeros fill the last chunk, and leave the state as it is."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk))
    return x.unflatten(2, groups).unflatten(1, (-1, chunk)).movedim((3, 4), (1, 2))


def _documents(documents_BS: Tensor | None, chunk: int) -> Tensor | None:
    """[B, S] -> [B, N, C]."""
    if documents_BS is None:
        return None
    return F.pad(documents_BS, (0, -documents_BS.shape[1] % chunk), value=-1).unflatten(1, (-1, chunk))


def _decays(log_decay: Tensor, documents_BNC: Tensor | None) -> _Decays:
    """Compute the decays within chunks, from the logarithm of each token's, [B, G, R, N, C]."""
    summed = log_decay.cumsum(dim=-1)
    seen = torch.ones(2 * summed.shape[-1:], dtype=torch.bool, device=summed.device).tril()
    last = summed[..., -1:]
    since_begin, until_end, whole = summed.exp(), (last - summed).exp(), last.exp().squeeze(-1)
    if documents_BNC is not None:
        ends_BN = documents_BNC[..., -1]
        before_BN = torch.cat([documents_BNC[:, :1, 0], ends_BN[:, :-1]], dim=1)
        seen = (seen & (documents_BNC.unsqueeze(-1) == documents_BNC.unsqueeze(-2)))[:, None, None]
        since_begin = since_begin * (documents_BNC == before_BN.unsqueeze(-1))[:, None, None]
        until_end = until_end * (documents_BNC == ends_BN.unsqueeze(-1))[:, None, None]
        whole = whole * (ends_BN == before_BN)[:, None, None]
    between = (summed.unsqueeze(-1) - summed.unsqueeze(-2)).masked_fill(~seen, -torch.inf).exp()
    return _Decays(between, since_begin, until_end, whole)


def _unit(x: Tensor) -> Tensor:
    """Divide vectors by their lengths."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + EPS)
