"""Positions and masks of a forward pass, computed once for all attention layers of a kind.

S new tokens follow P cached ones, of which a layer with a window has the last ones only; it attends to L tokens in all.
Without documents, window and cache there is no mask, so that the kernels for plain causal attention apply. On a GPU no
mask is made for documents and windows either: the kernel of ``ops/segment_attention.py`` takes the lengths of
documents, which the host knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.config import GqaConfig, LongRopeConfig, MlaConfig, ModelConfig
from moefoundry.model.rope import Rotation, rotation
from moefoundry.ops import cpu_attention
from moefoundry.ops.attention_sinks import attend_with_sinks
from moefoundry.ops.segment_attention import (
    Segments,
    attend_in_segments,
    segments_of_lengths,
    segments_of_rows,
    takes_segments,
)


class AttentionKind(NamedTuple):
    """The difference between attention layers of a model, beside their weights.

    Attributes:
        window: Tokens a position sees, itself included; None if it sees all before it.
        rotated: Queries and keys have a rotary embedding.
    """

    window: int | None = None
    rotated: bool = True


class AttentionContext(NamedTuple):
    """Positions and mask of one forward pass.

    Attributes:
        rotation: Rotation of the S new tokens.
        mask: bool [S, L] or [B, 1, S, L], True where a query sees a key. None if none is needed: attention is plainly
            causal, or a single new token sees all before it.
        is_causal: True in the first of these cases; a flag, since a compiled graph knows no lengths.
        window: Tokens a position sees, itself included; None if it sees all before it.
        documents: int64 [B, S], document of each of the S new tokens; None is one document a row.
        segments: Tokens see those before them in their segment; then there is no mask, whatever documents and window
            are.
    """

    rotation: Rotation
    mask: Tensor | None
    is_causal: bool
    window: int | None = None
    documents: Tensor | None = None
    segments: Segments | None = None


class Documents(NamedTuple):
    """Documents of a batch; padding at the end of a row is one, too.

    Attributes:
        ids_BS: int64 [B, S], ascending in a row; tokens of one document have the same.
        lengths: Tokens of each document of each row, known to the host; None lets it count them where it has to, for
            which it waits for a GPU.
    """

    ids_BS: Tensor
    lengths: Sequence[Sequence[int]] | None = None

    def without_last(self, tokens: int) -> Documents:
        """Leave out the last tokens of each row."""
        if self.lengths is None:
            return Documents(self.ids_BS[:, :-tokens])
        length = self.ids_BS.shape[1] - tokens
        return Documents(self.ids_BS[:, :-tokens], [_first(row, length) for row in self.lengths])


def lengths_of_documents(ids_BS: Tensor) -> list[list[int]]:
    """Count the tokens of each document of each row."""
    return [row_S.unique_consecutive(return_counts=True)[1].tolist() for row_S in ids_BS.cpu()]


def _first(lengths: Sequence[int], tokens: int) -> list[int]:
    """Shorten documents to the first ``tokens`` tokens of their row."""
    kept = []
    for length in lengths:
        kept.append(min(length, tokens))
        tokens -= kept[-1]
    return [length for length in kept if length]


def attention_context(
    cfg: ModelConfig, input_ids_BS: Tensor, sequence_id_BS: Tensor | None = None, num_cached: int = 0
) -> AttentionContext:
    """Compute the context of a forward pass over ``input_ids_BS`` in fp32 for layers with the window of all.

    Arguments are those of :func:`attention_contexts`.
    """
    kind = AttentionKind(cfg.attention.window)
    documents = None if sequence_id_BS is None else Documents(sequence_id_BS)
    return attention_contexts(cfg, [kind], input_ids_BS, documents, num_cached)[kind]


def attention_contexts(
    cfg: ModelConfig,
    kinds: Iterable[AttentionKind],
    input_ids_BS: Tensor,
    documents: Documents | None = None,
    num_cached: int = 0,
    dtype: torch.dtype = torch.float32,
    lengths: Tensor | None = None,
) -> dict[AttentionKind, AttentionContext]:
    """Compute the contexts of a forward pass over ``input_ids_BS``, by kind.

    Args:
        cfg: Has the attention.
        kinds: Kinds of attention layers.
        input_ids_BS: Gives shape and device.
        documents: Positions start at 0 in each document, and no token sees another document. None is one document a
            row.
        num_cached: P.
        dtype: Of queries, keys and values.
        lengths: From :func:`lengths_for_longrope`, where they are not those of documents and rows here.

    Raises:
        ValueError: The cache has keys of LongRoPE's short factors, and with these tokens the long ones are due.
    """
    attention, (rows, seq_len) = cfg.attention, input_ids_BS.shape
    indices_L = torch.arange(num_cached + seq_len, device=input_ids_BS.device)
    sequence_id_BS = None if documents is None else documents.ids_BS
    positions = indices_L[num_cached:] if sequence_id_BS is None else positions_in_documents(sequence_id_BS)
    segments = None
    if num_cached == 0 and _takes_segments(cfg, input_ids_BS.device, dtype):
        segments = _segments(documents, rows, seq_len, input_ids_BS.device)
    rotations: dict[tuple[bool, int], Rotation] = {}
    contexts = {}
    for kind in dict.fromkeys(kinds):
        window, rope = kind.window, attention.rope_of(kind.window)
        width = attention.rotary_dim(cfg.d_model) if kind.rotated else 0
        turned = rope is attention, width
        if turned not in rotations:
            if rope.longrope is not None:
                _check_cached(rope.longrope, num_cached, seq_len)
                if lengths is None:
                    lengths = lengths_for_longrope(input_ids_BS, documents, num_cached=num_cached)
            placed = positions if lengths is None or lengths.dim() == 0 else positions.expand_as(lengths)
            rotations[turned] = rotation(placed, width, rope, lengths)
        plain = documents is None and (window is None or window >= seq_len) and not attention.sinks
        if segments is not None and not plain:
            contexts[kind] = AttentionContext(rotations[turned], None, True, window, sequence_id_BS, segments)
            continue
        cached = num_cached if window is None else min(num_cached, window - 1)
        mask = _mask(indices_L[: cached + seq_len], cached, window, sequence_id_BS)
        is_causal = mask is None and cached == 0
        contexts[kind] = AttentionContext(rotations[turned], mask, is_causal, window, sequence_id_BS)
    return contexts


def _takes_segments(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell if attention can be computed in segments: of a kind that has no mask of its own, and by the kernel."""
    attention = cfg.attention
    if type(attention) is GqaConfig:
        return takes_segments(device, dtype, attention.head_width(cfg.d_model))
    if type(attention) is MlaConfig and attention.indexer is None:
        width = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        return takes_segments(device, dtype, max(width, attention.v_head_dim))
    return False


def _segments(documents: Documents | None, rows: int, length: int, device: torch.device) -> Segments:
    if documents is None:
        return segments_of_rows(rows, length, device)
    lengths = lengths_of_documents(documents.ids_BS) if documents.lengths is None else documents.lengths
    return segments_of_lengths([tokens for row in lengths for tokens in row], device)


def lengths_for_longrope(
    input_ids_BS: Tensor,
    documents: Documents | None = None,
    padding_BS: Tensor | None = None,
    num_cached: int = 0,
) -> Tensor:
    """Count the tokens of the sequence that each token is in: int64 [B, S], or a scalar if it is the same for all.

    Args:
        input_ids_BS: Gives shape and device.
        documents: Documents that do not see each other; None is one a row.
        padding_BS: int64 [B, S], -1 on padding at the end of such rows, which does not count; None is no padding.
        num_cached: Tokens before these.
    """
    if documents is not None:
        return tokens_of_documents(documents.ids_BS)
    if padding_BS is not None:
        return (padding_BS >= 0).sum(dim=1, keepdim=True).expand_as(padding_BS)
    return torch.full((), num_cached + input_ids_BS.shape[1], device=input_ids_BS.device)


def _check_cached(longrope: LongRopeConfig, num_cached: int, num_new: int) -> None:
    border = longrope.original_max_seq_len
    if 0 < num_cached <= border < num_cached + num_new:
        raise ValueError(f"{num_cached} tokens are cached, and beyond {border} LongRoPE turns all keys otherwise")


def tokens_of_documents(sequence_id_BS: Tensor) -> Tensor:
    """Count the tokens of the document that each token is in, int64 [B, S]."""
    starts_BS = (positions_in_documents(sequence_id_BS) == 0).long()
    documents_BS = starts_BS.cumsum(dim=1) - 1
    counts_BS = torch.zeros_like(documents_BS).scatter_add(1, documents_BS, torch.ones_like(documents_BS))
    return counts_BS.gather(1, documents_BS)


def positions_in_documents(sequence_id_BS: Tensor) -> Tensor:
    """Compute each token's distance from the first token of its document, int64 [B, S]."""
    indices_S = torch.arange(sequence_id_BS.shape[1], device=sequence_id_BS.device)
    begins_BS = F.pad(sequence_id_BS[:, 1:] != sequence_id_BS[:, :-1], (1, 0), value=True)
    return indices_S - (indices_S * begins_BS).cummax(dim=1).values


def _mask(indices_L: Tensor, num_cached: int, window: int | None, sequence_id_BS: Tensor | None) -> Tensor | None:
    length, num_new = len(indices_L), len(indices_L) - num_cached
    if window is not None and window >= length:
        window = None
    if sequence_id_BS is None and window is None and (num_cached == 0 or num_new == 1):
        return None
    distance_SL = indices_L[num_cached:, None] - indices_L
    mask = distance_SL >= 0
    if window is not None:
        mask = mask & (distance_SL < window)
    if sequence_id_BS is not None:
        mask = mask & (sequence_id_BS[:, None, :, None] == sequence_id_BS[:, None, None, :])
    return mask


def attend(
    q_BHSd: Tensor,
    k_BHLd: Tensor,
    v_BHLd: Tensor,
    context: AttentionContext,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Compute scaled dot-product attention.

    Args:
        q_BHSd: Queries of the S new tokens.
        k_BHLd: Keys of all L tokens; as many heads as queries, or a divisor.
        v_BHLd: Values of all L tokens; as many heads as keys, maybe of another width.
        context: Has the mask, or the segments.
        scale: Factor of the products; None is ``d ** -0.5``.
        sinks_H: Logit of each head that the softmax counts in its denominator, and nowhere else.

    Returns:
        [B, S, H * width of a value].
    """
    if context.segments is not None:
        return attend_in_segments(q_BHSd, k_BHLd, v_BHLd, context.segments, context.window, scale, sinks_H)
    if sinks_H is not None:
        out_BHSd = attend_with_sinks(q_BHSd, k_BHLd, v_BHLd, sinks_H, context.mask, context.is_causal, scale)
        return out_BHSd.transpose(1, 2).flatten(2)
    if context.is_causal and cpu_attention.takes(q_BHSd, k_BHLd, v_BHLd):
        return cpu_attention.cpu_attention(q_BHSd, k_BHLd, v_BHLd, scale).flatten(2)
    if context.mask is not None and q_BHSd.shape[1] != k_BHLd.shape[1]:
        # CUDA's kernel that takes a mask and keeps no [S, L] products wants as many key heads as query heads.
        repeats = q_BHSd.shape[1] // k_BHLd.shape[1]
        k_BHLd, v_BHLd = (x.repeat_interleave(repeats, dim=1) for x in (k_BHLd, v_BHLd))
    out_BHSd = F.scaled_dot_product_attention(
        q_BHSd,
        k_BHLd,
        v_BHLd,
        attn_mask=context.mask,
        is_causal=context.is_causal,
        scale=scale,
        enable_gqa=q_BHSd.shape[1] != k_BHLd.shape[1],
    )
    return out_BHSd.transpose(1, 2).flatten(2)
