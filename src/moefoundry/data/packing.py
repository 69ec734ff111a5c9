"""Packing of token documents of any length into samples of one length, with nothing lost in between.

Documents, each with its end-of-text token, form one stream that is cut every ``seq_len`` tokens. A sample may hold
several documents and a document may span several samples, so no compute goes to padding. The tail of the stream,
shorter than one sample, is dropped: at most ``seq_len - 1`` tokens of a whole split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(runs: Iterable[NDArray[Any]], seq_len: int) -> Iterator[NDArray[Any]]:
    """Cut a stream of tokens into samples.

    Args:
        runs: Consecutive tokens of the stream: integers of any one dtype, each of shape [any].
        seq_len: Tokens of one sample.

    Yields:
        Arrays of shape [samples, seq_len], with at least one sample: the stream in order, its tail dropped.

    Raises:
        ValueError: ``seq_len`` is less than 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, not {seq_len}")
    pending: list[NDArray[Any]] = []
    size = 0
    for run in runs:
        pending.append(run)
        size += len(run)
        if complete := size // seq_len:
            tokens = np.concatenate(pending)
            yield tokens[: complete * seq_len].reshape(complete, seq_len)
            pending = [tokens[complete * seq_len :]]
            size -= complete * seq_len
