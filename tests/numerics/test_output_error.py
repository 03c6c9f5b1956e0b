"""The objective against a sum over tokens in float64."""

from __future__ import annotations

import torch

from awqkit.numerics.grid import split_groups
from awqkit.numerics.output_error import diagonal_blocks, group_row_errors, row_errors, weighted_error
from awqkit.numerics.statistics import accumulate_, empty_statistics, finished, second_moment

GROUP = 8


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    error = 0.01 * torch.randn(5, 24, generator=generator)
    return x, error, second_moment(finished(accumulate_(empty_statistics(24), x)))


def test_row_errors_are_the_mean_squared_change_of_each_output() -> None:
    x, error, moment = _case()
    expected = torch.zeros(5, dtype=torch.float64)
    for token in x.double():
        expected += (error.double() @ token).square() / len(x)
    torch.testing.assert_close(row_errors(error, moment).double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(weighted_error(error, moment), float(expected.sum()), rtol=1e-4, atol=0)


def test_row_weights_weigh_rows() -> None:
    _, error, moment = _case()
    weight = torch.tensor([0.0, 2.0, 0.5, 1.0, 3.0])
    expected = float((row_errors(error, moment) * weight).sum())
    torch.testing.assert_close(weighted_error(error, moment, weight), expected)
    assert weighted_error(error, moment, torch.tensor([0.0, 0, 0, 0, 0])) == 0.0


def test_group_errors_see_one_group_of_the_input_each() -> None:
    x, error, moment = _case()
    found = group_row_errors(split_groups(error, GROUP), diagonal_blocks(moment, GROUP))
    assert found.shape == (3, 5)
    for group in range(3):
        part = slice(group * GROUP, (group + 1) * GROUP)
        expected = (x[:, part].double() @ error[:, part].double().t()).square().mean(dim=0)
        torch.testing.assert_close(found[group].double(), expected, rtol=1e-4, atol=0)


def test_diagonal_blocks_are_cut_from_the_diagonal() -> None:
    moment = torch.arange(36.0).reshape(6, 6)
    blocks = diagonal_blocks(moment, 2)
    assert blocks.tolist() == [[[0, 1], [6, 7]], [[14, 15], [20, 21]], [[28, 29], [34, 35]]]
