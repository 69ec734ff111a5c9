"""Packing, on streams small enough to cut by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefoundry.data.packing import pack

EOS = 0


def cut(documents: list[list[int]], seq_len: int) -> list[list[int]]:
    runs = [np.array([*document, EOS]) for document in documents]
    return [sample.tolist() for many in pack(runs, seq_len) for sample in many]


def test_documents_are_joined_by_eos_and_the_tail_is_dropped() -> None:
    # stream: 1 2 3 0 4 0 5 6 7 8 0  ->  [1 2 3 0] [4 0 5 6] and a tail of 7 8 0
    assert cut([[1, 2, 3], [4], [5, 6, 7, 8]], 4) == [[1, 2, 3, 0], [4, 0, 5, 6]]


def test_one_document_may_fill_many_samples() -> None:
    # stream: 1 2 3 4 5 0  ->  no tail
    assert cut([[1, 2, 3, 4, 5]], 2) == [[1, 2], [3, 4], [5, 0]]


def test_empty_document_is_one_eos_and_no_documents_are_no_samples() -> None:
    assert cut([[], [1]], 3) == [[0, 1, 0]]
    assert cut([], 3) == []
    assert cut([[1]], 3) == []


def test_it_is_lazy() -> None:
    def endless():
        while True:
            yield np.array([1, 1, 0])

    samples = pack(endless(), 4)
    assert next(samples).tolist() == [[1, 1, 0, 1]]
    assert next(samples).tolist() == [[1, 0, 1, 1]]


def test_dtype_is_kept() -> None:
    (sample,) = pack([np.array([65535], np.uint16), np.array([0], np.uint16)], 2)
    assert sample.dtype == np.uint16
    assert sample.tolist() == [[65535, 0]]


def test_seq_len_must_be_positive() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 1, not 0"):
        list(pack([np.array([1])], 0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=8), st.integers(1, 7))
def test_samples_are_a_prefix_of_the_stream(documents: list[list[int]], seq_len: int) -> None:
    stream = [token for document in documents for token in [*document, EOS]]
    flat = [token for sample in cut(documents, seq_len) for token in sample]
    assert flat == stream[: len(stream) // seq_len * seq_len]
