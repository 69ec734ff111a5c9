"""Experts that are dealt to tokens in turn, whatever their scores: for benchmarks, and for plans, without torch."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import cache


@cache
def dealt_once(top_k: int, num_experts: int, num_groups: int, top_k_groups: int) -> tuple[tuple[int, ...], ...]:
    """Deal experts to the P tokens after which the assignment repeats, [P, K].

    In a round of G tokens, every group comes up once for each slot k. So its experts come up in turn if slot k of round
    r takes number ``r * K + k`` of them. The order of groups in each round, and of experts in each group, is shuffled.
    """
    group_size = num_experts // num_groups
    rounds = group_size // math.gcd(group_size, top_k)
    draw = _draws()
    members = [_shuffled(group_size, draw) for _ in range(num_groups)]
    groups = [_shuffled(num_groups, draw) for _ in range(rounds)]
    dealt = []
    for token in range(rounds * num_groups):
        turn = token // num_groups
        chosen = [groups[turn][(token + k * top_k_groups // top_k) % num_groups] for k in range(top_k)]
        places = [(turn * top_k + k) % group_size for k in range(top_k)]
        dealt.append(tuple(g * group_size + members[g][place] for g, place in zip(chosen, places, strict=True)))
    return tuple(dealt)


def tokens_by_place(tokens: int, dealt: tuple[tuple[int, ...], ...], num_experts: int, num_places: int) -> list[int]:
    """Count the tokens that have an expert at each place, of ``tokens`` tokens that are dealt as in ``dealt``.

    Args:
        tokens: T.
        dealt: From :func:`dealt_once`.
        num_experts: E.
        num_places: Ranks or nodes, each with as many consecutive experts.
    """
    times, rest = divmod(tokens, len(dealt))
    counts: Counter[int] = Counter()
    for number, ids in enumerate(dealt):
        for place in {expert // (num_experts // num_places) for expert in ids}:
            counts[place] += times + (number < rest)
    return [counts[place] for place in range(num_places)]


def _draws() -> random.Random:
    """Make what ``torch.Generator().manual_seed(0)`` is on a CPU: a Mersenne Twister, seeded by a number."""
    words = [0]
    for index in range(1, 624):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + index) & 0xFFFFFFFF)
    generator = random.Random()
    generator.setstate((3, (*words, 624), None))
    return generator


def _shuffled(size: int, draw: random.Random) -> list[int]:
    """Shuffle ``range(size)`` as ``torch.randperm`` does."""
    numbers = list(range(size))
    for first in range(size - 1):
        other = first + draw.getrandbits(32) % (size - first)
        numbers[first], numbers[other] = numbers[other], numbers[first]
    return numbers
