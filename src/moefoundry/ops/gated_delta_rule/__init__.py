"""The gated delta rule, the recurrence of Gated DeltaNet (arXiv 2412.06464, equation 10).

A head keeps a state S [K, V], which maps keys to values. A token with the query q, the key k, the value v, the decay
exp(g) and the strength beta makes of it

    S <- exp(g) S;    S <- S + beta k (v - k S);    its output is q S

    chunked.py    in PyTorch, a chunk of tokens at a time: the reference
    fused.py      by the kernels of flash-linear-attention, where that is installed

Letters: B batch, S sequence, G heads of queries and keys, H heads of values, K width of a key, V width of a value.
Value head ``g * H / G`` and the H / G - 1 after it share the query and key of head g.
"""

from __future__ import annotations

from torch import Tensor

from moefoundry.ops.gated_delta_rule import chunked
from moefoundry.ops.gated_delta_rule.fused import FUSED_DTYPES, fused_delta_rule, has_fused
from moefoundry.ops.sizes import DELTA_CHUNK

__all__ = ["gated_delta_rule", "has_fused"]


def gated_delta_rule(
    q_BSGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    documents_BS: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences.

    Args:
        q_BSGK: Queries; each is divided by its length, and by ``K ** 0.5``.
        k_BSGK: Keys; each is divided by its length.
        v_BSHV: Values.
        log_decay_BSH: fp32 or wider, at most 0.
        beta_BSH: Between 0 and 1.
        documents_BS: int64 [B, S], ascending; the state is empty at the first token of a document. None is one document
            a row.
        state_BHKV: State after the tokens before these; None is empty.
        fused: Compute with the kernels, where tensors are BF16 or FP16 on a GPU. All others are computed in PyTorch.

    Returns:
        Outputs [B, S, H, V] in the dtype of ``v``, and the state after the last token, fp32 or wider, [B, H, K, V].
        With documents the state is not defined.
    """
    if fused and v_BSHV.is_cuda and v_BSHV.dtype in FUSED_DTYPES:
        run = fused_delta_rule
    else:
        run = chunked.chunked_delta_rule if v_BSHV.shape[1] <= DELTA_CHUNK else chunked.uncompiled
    return run(q_BSGK, k_BSGK, v_BSHV, log_decay_BSH, beta_BSH, documents_BS, state_BHKV)
