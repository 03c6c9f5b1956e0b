"""The numbers about a channel scale, and counts at points, against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from awqkit.decisions import LOG2_SCALE_POINTS, ScaleSummary
from awqkit.numerics.histogram import counts_at
from awqkit.numerics.scale_summary import scale_summary


def wide_scale(channels: int = 333) -> torch.Tensor:
    """An s with a heavy tail on both sides, so that every share is above 0."""
    generator = torch.Generator().manual_seed(5)
    return torch.exp(1.3 * torch.randn(channels, generator=generator))


def test_the_numbers_are_those_of_a_loop() -> None:
    values = [float(value) for value in wide_scale()]
    found = scale_summary(wide_scale(), LOG2_SCALE_POINTS)
    mean = sum(values) / len(values)
    assert found.mean == pytest.approx(mean)
    assert (found.min, found.max) == (min(values), max(values))
    assert found.std == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))
    assert found.max_over_mean == pytest.approx(max(values) / mean)
    for share, chosen in (
        (found.share_above_5x, [value > 5 * mean for value in values]),
        (found.share_above_2x, [value > 2 * mean for value in values]),
        (found.share_below_half, [value < mean / 2 for value in values]),
    ):
        assert share == sum(chosen) / len(values)
        assert share > 0
    assert list(found.log2_counts) == nearest_counts([math.log2(value) for value in values], LOG2_SCALE_POINTS)


def test_a_scale_of_ones_is_all_at_the_middle() -> None:
    found = scale_summary(torch.ones(8), LOG2_SCALE_POINTS)
    assert found[:8] == (1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    assert found.log2_counts[len(LOG2_SCALE_POINTS) // 2] == 8
    assert sum(found.log2_counts) == 8


def test_one_channel_has_no_spread() -> None:
    assert scale_summary(torch.tensor([3.0]), LOG2_SCALE_POINTS).std == 0.0


def test_it_fits_the_decision() -> None:
    found = scale_summary(wide_scale(), LOG2_SCALE_POINTS)
    assert ScaleSummary(**found._asdict()).log2_counts == found.log2_counts


def test_what_is_given_stays_as_it_is() -> None:
    scale = wide_scale()
    before = scale.clone()
    scale_summary(scale, LOG2_SCALE_POINTS)
    assert torch.equal(scale, before)


def test_counts_are_those_of_a_loop_and_what_lies_outside_is_at_the_ends() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(7, 50, generator=generator)
    points = (-1.0, -0.5, 0.0, 0.5, 1.0)
    found = counts_at(values, points)
    assert list(found) == nearest_counts([float(value) for value in values.flatten()], points)
    assert sum(found) == 350
    assert counts_at(torch.tensor([-9.0, 9.0, 9.0]), points) == (1, 0, 0, 0, 2)


def test_no_values_give_no_counts() -> None:
    assert counts_at(torch.tensor([]), (0.0, 1.0)) == (0, 0)


def nearest_counts(values: list[float], points: tuple[float, ...]) -> list[int]:
    """For each point how many of `values` are nearest to it."""
    nearest = [min(range(len(points)), key=lambda index: abs(value - points[index])) for value in values]
    return [nearest.count(index) for index in range(len(points))]
