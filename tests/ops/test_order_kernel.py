"""The order of rows by kernels is the one by operators, bit for bit: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch

from moefoundry.ops.permute import order_by_expert

pytest.importorskip("triton", reason="triton is not installed")

CASES = [(1, 1, 1, 1.0), (37, 3, 12, 1.0), (129, 1, 5, 0.4), (300, 8, 300, 0.7), (64, 2, 1000, 0.0), (0, 2, 4, 1.0)]
LARGE = [(24576, 8, 128, 1.0), (32768, 8, 512, 0.3), (2048, 8, 32, 1.0), (100001, 1, 1024, 0.9), (300000, 8, 3, 0.5)]
"""T, K, E and the share of the slots that has rows."""


def check_order(device: str, tokens: int, top_k: int, experts: int, share: float) -> None:
    """Ids in which experts come unequally often; some have no rows."""
    torch.manual_seed(tokens)
    ids_TK = (torch.rand(tokens, top_k, device=device) ** 2 * experts).long()
    kept_TK = None if share == 1 else torch.rand(ids_TK.shape, device=device) < share
    num_kept = None if kept_TK is None else int(kept_TK.sum())
    for ids in (ids_TK, ids_TK.int(), ids_TK.T.contiguous().T):
        expected = order_by_expert(ids, experts, kept_TK, num_kept)
        with mock.patch("moefoundry.ops.permute.kernels_run", return_value=True):
            got = order_by_expert(ids, experts, kept_TK, num_kept)
        for ours, theirs in zip(got.tensors, expected.tensors, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(interpreter: ProcessPoolExecutor, case: tuple[int, int, int, float]) -> None:
    interpreter.submit(check_order, "cpu", *case).result()


def check_bounds(device: str) -> None:
    """Where more slots are kept than there are rows, nothing is written behind these."""
    from moefoundry.ops.order_kernel import count_slots, place_slots, sum_blocks

    ids_S, rows = torch.tensor([2, 0, 1, 1, 0, 2, 1, 0], device=device), 5
    counts, totals_E = torch.zeros(1, 3, dtype=torch.int32, device=device), torch.zeros(3, dtype=torch.int64)
    order = [torch.full((9,), -7, device=device) for _ in range(3)]
    constants = {"E": 4, "BLOCK": 8, "num_warps": 1}
    count_slots[(1,)](ids_S, None, counts, 8, 3, **constants)
    sum_blocks[(3,)](counts, totals_E.to(device), 1, 3, PART=16)
    place_slots[(1,)](ids_S, None, counts, torch.tensor([3, 3, 2], device=device), *order, 8, rows, 3, 1, **constants)
    assert [each[rows:].tolist() for each in order[:2]] == [[-7] * 4] * 2
    assert order[0][:rows].tolist() == [1, 4, 7, 2, 3]


def test_nothing_is_written_behind_the_rows(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(check_bounds, "cpu").result()


def test_the_kernels_are_asked_only_where_they_can_answer() -> None:
    ids_TK = torch.zeros(5, 2, dtype=torch.int64)
    kernels = "moefoundry.ops.order_kernel.order_slots"
    with mock.patch("moefoundry.ops.permute.kernels_run", return_value=True), mock.patch(kernels) as asked:
        order_by_expert(ids_TK, 4, ids_TK == 0)  # how many are kept is not known
        order_by_expert(ids_TK, 1025)
        order_by_expert(ids_TK[:0], 4)
        asked.assert_not_called()
        asked.return_value = [torch.empty(0)] * 4
        order_by_expert(ids_TK, 4)
        asked.assert_called_once()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_on_a_gpu(case: tuple[int, int, int, float]) -> None:
    check_order("cuda", *case)
