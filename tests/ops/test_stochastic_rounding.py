"""Stochastic rounding is unbiased, to the last bit, and its noise is as good as random."""

import math

import pytest
import torch
from torch import Tensor

from moefoundry.ops.stochastic_rounding import hash_bits, lower_half, round_stochastically, upper_half

EVERY_NOISE = torch.arange(2**16, dtype=torch.int32)


def bits_of(*patterns: int) -> Tensor:
    """fp32 values by their bits."""
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("value", [1.0 + 2**-10, -3.3, 2.9e-12, -7.7e30, 1e-39, 0.1])
def test_the_mean_over_all_noise_is_the_value_itself(value: float) -> None:
    """2**16 BF16 values add up exactly in fp64."""
    x = torch.full((2**16,), value)
    rounded = round_stochastically(x, EVERY_NOISE)
    assert rounded.dtype == torch.bfloat16
    assert len(rounded.unique()) == 2
    assert rounded.double().mean() == x[0].double()


def test_bf16_values_and_what_is_not_finite_stay() -> None:
    kept = torch.cat([torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16().float(), torch.zeros(1)])
    special = bits_of(0x7F800000, 0xFF800000, 0x80000000)  # infinities, minus zero
    nan = bits_of(0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)  # 0x7FFFFFFF is what NVIDIA's GPUs make
    for noise in (0, 1, 0x8000, 0xFFFF):
        for x in (kept, special):
            rounded = round_stochastically(x, torch.full(x.shape, noise, dtype=torch.int32))
            assert torch.equal(rounded.view(torch.int16), x.bfloat16().view(torch.int16))
        assert round_stochastically(nan, torch.full(nan.shape, noise, dtype=torch.int32)).isnan().all()


def test_the_hash_wraps_as_unsigned_numbers_do() -> None:
    def expected(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) % 2**32
        return x ^ (x >> 16)

    counters = [0, 1, 2, 12345, 2**31 - 1, -(2**31), -1, -77]
    hashed = hash_bits(torch.tensor(counters, dtype=torch.int32))
    assert [value % 2**32 for value in hashed.tolist()] == [expected(counter % 2**32) for counter in counters]
    assert lower_half(hashed).tolist() == [value % 2**16 for value in hashed.tolist()]
    assert upper_half(hashed).tolist() == [value % 2**32 >> 16 for value in hashed.tolist()]


@pytest.mark.parametrize("first", [0, 987_654_321])
def test_noise_of_neighbouring_counters_is_uniform_and_uncorrelated(first: int) -> None:
    """Within five standard deviations of a mean over a million."""
    count = 2**20
    bits = hash_bits(torch.arange(first, first + count, dtype=torch.int32))
    uniform = [(half.double() + 0.5) / 2**16 - 0.5 for half in (lower_half(bits), upper_half(bits))]
    limit = 5 / math.sqrt(count)
    for noise in uniform:
        assert abs(noise.mean()) < limit * math.sqrt(1 / 12)
        assert abs((noise**2).mean() * 12 - 1) < limit
        for distance in (1, 2, 64, 256, 4096):
            assert abs((noise[distance:] * noise[:-distance]).mean() * 12) < limit * 1.01
    assert abs((uniform[0] * uniform[1]).mean() * 12) < limit
