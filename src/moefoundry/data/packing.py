"""Packing of token documents of any length into samples of one length, with nothing lost in between.

Documents, each followed by the end-of-text token, form one stream that is cut every ``seq_len`` tokens. A sample may
hold several documents and a document may span several samples, so no compute goes to padding. The tail of the stream,
shorter than one sample, is dropped: at most ``seq_len - 1`` tokens of a whole split.

The input is an iterable of token documents and nothing else: a transform of documents (such as fill-in-the-middle,
which permutes the parts of one document) goes in front, as another generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def pack(
    documents: Iterable[Sequence[int] | NDArray[Any]], *, eos_id: int, seq_len: int, dtype: DTypeLike = np.int64
) -> Iterator[NDArray[Any]]:
    """Concatenate documents and cut the stream into samples.

    Args:
        documents: Token ids of each document, without the end-of-text token.
        eos_id: Token put behind every document.
        seq_len: Tokens of one sample.
        dtype: Integer type of the samples; must hold every id.

    Yields:
        Arrays of shape [seq_len]: the stream in order, its tail dropped.

    Raises:
        ValueError: ``seq_len`` is less than 1.
        OverflowError: A token id does not fit in ``dtype``.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, not {seq_len}")
    pending = np.empty(0, dtype)
    for document in documents:
        pending = np.concatenate([pending, _checked(document, dtype), np.array([eos_id], dtype)])
        complete = len(pending) // seq_len
        yield from pending[: complete * seq_len].reshape(complete, seq_len)
        pending = pending[complete * seq_len :]


def ended(
    documents: Iterable[Sequence[int] | NDArray[Any]], *, eos_id: int, dtype: DTypeLike = np.int64
) -> Iterator[NDArray[Any]]:
    """Put the end-of-text token behind every document; arguments and errors as of :func:`pack`.

    Yields:
        Arrays of shape [tokens of the document + 1].
    """
    for document in documents:
        yield np.append(_checked(document, dtype), np.array(eos_id, dtype))


def _checked(document: Sequence[int] | NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Convert ids to ``dtype``; an id that does not fit must not wrap around in silence."""
    ids = np.asarray(document, np.int64)
    limits = np.iinfo(dtype)
    if ids.size and (ids.min() < limits.min or ids.max() > limits.max):
        raise OverflowError(f"token ids {ids.min()}..{ids.max()} do not fit in {np.dtype(dtype)}")
    return ids.astype(dtype)
