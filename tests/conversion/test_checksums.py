"""Checksums of tensors whose rows come in any order."""

from hashlib import sha256
from itertools import permutations

import torch

from moefoundry.conversion.checksums import _RowsInOrder


def test_rows_may_come_in_any_order() -> None:
    values = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    parts = [(0, values[:2]), (2, values[2:3]), (3, values[3:])]
    for order in permutations(parts):
        found = _RowsInOrder()
        for row, rows in order:
            found.add((row, 0), rows)
        assert found.hash.hexdigest() == sha256(values.numpy().tobytes()).hexdigest()
    scalar = _RowsInOrder()
    scalar.add((), torch.tensor(3.0))
    assert scalar.hash.hexdigest() == sha256(torch.tensor(3.0).numpy().tobytes()).hexdigest()
