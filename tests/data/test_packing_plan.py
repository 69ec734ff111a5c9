"""Packing plans: nothing is lost or comes twice, best-fit decreasing is what it says, and little room is left."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefoundry.data.packing_plan import PackingPlan, best_fit, concatenated

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60).map(lambda lengths: np.array(lengths, np.int32))


def rows_of(plan: PackingPlan) -> list[list[tuple[int, int, int]]]:
    """Document, start and stop of each piece of each row."""
    return [[plan.piece(row, number) for number in range(len(plan.documents_of(row)))] for row in range(plan.rows)]


def one_by_one(sizes: list[int], room: int) -> list[int]:
    """Room left in each bin, by the definition: the largest first, into the bin with the least room that holds it."""
    left: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [(space, number) for number, space in enumerate(left) if space >= size]
        if fitting:
            left[min(fitting)[1]] -= size
        else:
            left.append(room - size)
    return sorted(left)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 40), window=st.sampled_from([40, 10**6]))
@pytest.mark.parametrize("method", [concatenated, best_fit])
def test_every_token_is_in_one_row(method: Callable, lengths: np.ndarray, seq_len: int, window: int) -> None:
    plan = method(lengths, seq_len) if method is concatenated else method(lengths, seq_len, window)
    times = [np.zeros(length, int) for length in lengths]
    rows = rows_of(plan)
    for row in rows:
        assert 0 < sum(stop - start for _, start, stop in row) <= seq_len
        assert [document for document, _, _ in row] == sorted({document for document, _, _ in row})
        for document, start, stop in row:
            times[document][start:stop] += 1
    assert all((seen == 1).all() for seen in times)
    assert plan.tokens == lengths.sum()
    assert plan.first_documents.tolist() == [row[0][0] for row in rows] == sorted(row[0][0] for row in rows)
    assert plan.waste == pytest.approx(1 - lengths.sum() / (len(rows) * seq_len))
    assert plan.cut == len({document for row in rows for document, start, _ in row if start})


def test_concatenation_cuts_the_stream_in_order() -> None:
    plan = concatenated(np.array([3, 9, 1, 2], np.int32), 4)
    assert rows_of(plan) == [
        [(0, 0, 3), (1, 0, 1)],
        [(1, 1, 5)],
        [(1, 5, 9)],
        [(2, 0, 1), (3, 0, 2)],
    ]


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_best_fit_cuts_only_what_is_longer_than_a_row_and_fills_rows_best(lengths: np.ndarray, seq_len: int) -> None:
    rows = rows_of(best_fit(lengths, seq_len))
    for document, length in enumerate(lengths.tolist()):
        pieces = sorted((start, stop) for row in rows for number, start, stop in row if number == document)
        ends = [min(start + seq_len, length) for start in range(0, length, seq_len)]
        assert pieces == list(zip(range(0, length, seq_len), ends, strict=True))
    rests = [int(length % seq_len) for length in lengths if length % seq_len]
    left = sorted(seq_len - sum(stop - start for _, start, stop in row) for row in rows)
    assert left == sorted([0] * int((lengths // seq_len).sum()) + one_by_one(rests, seq_len))


def test_windows_bound_what_a_row_is_made_of() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000).astype(np.int32)
    plan = best_fit(lengths, 128, window_tokens=4096)
    windows = (lengths.cumsum() - lengths) // 4096
    for row in range(plan.rows):
        assert len(set(windows[plan.documents_of(row)].tolist())) == 1


def test_many_documents_are_planned_in_little_time_with_little_waste() -> None:
    lengths = np.random.default_rng(0).lognormal(5.8, 1.2, 200_000).clip(1, 50_000).astype(np.int32)
    plan = best_fit(lengths, 2048)
    assert plan.waste < 0.001
    assert plan.cut == np.count_nonzero(lengths > 2048)
