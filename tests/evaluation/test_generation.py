"""Greedy generation, with a model whose next token is known."""

import torch
from torch import Tensor

from moefoundry.evaluation.generation import greedy


def successor(ids_BS: Tensor) -> Tensor:
    """Logits [B, S, 10] that favour each token's successor."""
    return torch.nn.functional.one_hot((ids_BS + 1) % 10, 10).float()


def test_the_most_likely_token_follows() -> None:
    assert greedy(successor, torch.tensor([3, 7]), 4).tolist() == [8, 9, 0, 1]


def test_generation_ends_before_the_end_token() -> None:
    assert greedy(successor, torch.tensor([7]), 5, eos_id=9).tolist() == [8]
    assert greedy(successor, torch.tensor([7]), 1, eos_id=9).tolist() == [8]


def test_every_step_is_run_so_that_ranks_stay_together() -> None:
    lengths = []

    def counting(ids_BS: Tensor) -> Tensor:
        lengths.append(ids_BS.shape[1])
        return successor(ids_BS)

    greedy(counting, torch.tensor([8]), 3, eos_id=9)
    assert lengths == [1, 2, 3]


def test_nothing_to_add() -> None:
    assert greedy(successor, torch.tensor([3]), 0).tolist() == []
