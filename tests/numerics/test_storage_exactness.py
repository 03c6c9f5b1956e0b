"""The s that a rounded producer really has: stored value times s gives the gain back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.numerics.channel_scale import (
    exact_offset_under_storage,
    exact_under_storage,
    nearest_power_of_two,
    nearly_exact_pair_under_storage,
)

DTYPES = [torch.bfloat16, torch.float16]


def _gain(dtype: torch.dtype, channels: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    gain = torch.randn(channels, generator=generator) * torch.exp(torch.randn(channels, generator=generator))
    return gain.to(dtype).float()


def _scale(channels: int = 512) -> Tensor:
    return torch.exp(torch.empty(channels).uniform_(-1.6, 1.6, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_gain_times_s_is_the_gain(dtype: torch.dtype) -> None:
    gain, wanted = _gain(dtype), _scale()
    stored, s = exact_under_storage(gain, wanted, dtype)
    assert torch.equal(stored.to(dtype).float(), stored)
    # one rounding of a float32 division is all that may be left
    torch.testing.assert_close((stored.double() * s.double()).float(), gain, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(s, wanted, rtol=2**-8 if dtype == torch.bfloat16 else 2**-10, atol=0)
    assert bool((s != wanted).any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_offset_plus_one_times_s_is_the_gain(dtype: torch.dtype) -> None:
    offset, wanted = 0.3 * _gain(dtype), _scale()
    offset = offset.to(dtype).float()
    stored, s = exact_offset_under_storage(offset, wanted, dtype)
    assert torch.equal(stored.to(dtype).float(), stored)
    gain = 1.0 + offset
    torch.testing.assert_close(((1.0 + stored).double() * s.double()).float(), gain, rtol=1.2e-7, atol=0)
    near = (wanted < 4) & (gain.abs() > 0.1)  # else 1 + w' is too small for w' to be stored well
    torch.testing.assert_close(s[near], wanted[near], rtol=0.2, atol=0)


def test_an_identity_stays_exactly_one() -> None:
    gain, ones = _gain(torch.bfloat16), torch.ones(512)
    for exact in (exact_under_storage, exact_offset_under_storage):
        stored, s = exact(gain, ones, torch.bfloat16)
        assert torch.equal(s, ones)
        assert torch.equal(stored, gain)
    stored, companion, s = nearly_exact_pair_under_storage(gain, gain.flip(0), ones, torch.bfloat16)
    assert torch.equal(s, ones)
    assert torch.equal(stored, gain)
    assert torch.equal(companion, gain.flip(0))


@pytest.mark.parametrize(
    ("gain", "wanted"),
    [
        (0.0, 3.0),  # nothing to divide
        (1e-38, 1e6),  # the quotient is below bfloat16's normal range
        (1e38, 1e-6),  # above it
        (2.0, float("inf")),
    ],
)
def test_a_gain_that_cannot_be_divided_keeps_s_at_one(gain: float, wanted: float) -> None:
    start = torch.tensor([gain]).to(torch.bfloat16).float()
    stored, s = exact_under_storage(start, torch.tensor([wanted]), torch.bfloat16)
    assert stored.tolist() == start.tolist()
    assert s.tolist() == [1.0]


def test_float16_has_less_range() -> None:
    gain = torch.tensor([1e-3, 100.0, 1.0])
    gain = gain.to(torch.float16).float()
    stored, s = exact_under_storage(gain, torch.tensor([100.0, 1e-3, 1e3]), torch.float16)
    assert torch.equal(stored[:2], gain[:2])  # 1e-5 is subnormal, 1e5 is above 65504
    assert s[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(s[2], torch.tensor(1e3), rtol=1e-3, atol=0)


def test_the_sign_of_a_gain_is_kept() -> None:
    gain = torch.tensor([-1.5, 1.5])
    stored, s = exact_under_storage(gain, torch.tensor([3.0, 3.0]), torch.bfloat16)
    assert stored[0] == -stored[1]
    assert bool((s > 0).all())


@pytest.mark.parametrize(
    ("offset", "wanted"),
    [
        (-1.0, 3.0),  # 1 + w is 0
        (-0.5, 1e4),  # 1 + w' would be 0
        (-1.5, 2.0),  # a negative gain is an exact gain too
    ],
)
def test_offsets_at_the_edges_give_a_finite_positive_exact_s(offset: float, wanted: float) -> None:
    start = torch.tensor([offset])
    stored, s = exact_offset_under_storage(start, torch.tensor([wanted]), torch.bfloat16)
    assert bool(torch.isfinite(s).all())
    assert bool((s > 0).all())
    torch.testing.assert_close((1.0 + stored) * s, 1.0 + start)


def test_powers_of_two_are_powers_of_two() -> None:
    s = nearest_power_of_two(torch.tensor([0.2, 0.7, 0.72, 1.0, 1.41, 1.42, 3.0, 1000.0]))
    assert s.tolist() == [0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0, 1024.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_is_exact_in_the_gain_and_better_than_rounding_in_the_bias(dtype: torch.dtype) -> None:
    gain, bias, wanted = _gain(dtype), 0.1 * _gain(dtype).flip(0), _scale()
    bias = bias.to(dtype).float()
    stored, companion, s = nearly_exact_pair_under_storage(gain, bias, wanted, dtype)
    assert torch.equal(stored.to(dtype).float(), stored)
    assert torch.equal(companion.to(dtype).float(), companion)
    torch.testing.assert_close((stored.double() * s.double()).float(), gain, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(s, wanted, rtol=0.04, atol=0)
    miss = ((companion * s - bias) / bias).abs().mean()
    _, plain_s = exact_under_storage(gain, wanted, dtype)
    plain_miss = (((bias / plain_s).to(dtype).float() * plain_s - bias) / bias).abs().mean()
    assert float(miss) < 0.3 * float(plain_miss)  # the nearest of 9 random points: a fifth, if spread evenly


def test_a_pair_with_zeros_is_exact() -> None:
    gain, bias = torch.tensor([0.0, 1.5, -2.0]), torch.tensor([0.7, 0.0, 0.0])
    bias = bias.to(torch.bfloat16).float()
    stored, companion, s = nearly_exact_pair_under_storage(gain, bias, torch.tensor([3.0, 0.3, 2.7]), torch.bfloat16)
    assert bool(torch.isfinite(s).all())
    assert s[0] == 1.0
    torch.testing.assert_close(stored * s, gain)
    torch.testing.assert_close(companion * s, bias)
