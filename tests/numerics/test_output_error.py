"""The objective against a sum over tokens in float64."""

from __future__ import annotations

import torch

from awqkit.numerics.output_error import (
    diagonal_blocks,
    moment_diagonal,
    moment_divided,
    pushed,
    row_errors,
    weighted_error,
)
from awqkit.numerics.saliency import saliency_shares
from awqkit.numerics.statistics import accumulate_, empty_statistics, finished, in_blocks, second_moment

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


def test_diagonal_blocks_are_cut_from_the_diagonal() -> None:
    moment = torch.arange(36.0).reshape(6, 6)
    blocks = diagonal_blocks(moment, 2)
    assert blocks.tolist() == [[[0, 1], [6, 7]], [[14, 15], [20, 21]], [[28, 29], [34, 35]]]


def _without_correlations_between_groups(moment: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*diagonal_blocks(moment, GROUP))


def test_blocks_alone_are_a_moment_without_correlations_between_groups() -> None:
    _, error, moment = _case()
    blocks, whole = diagonal_blocks(moment, GROUP), _without_correlations_between_groups(moment)
    scale = torch.rand(24) + 0.5
    torch.testing.assert_close(pushed(error, blocks), pushed(error, whole))
    torch.testing.assert_close(row_errors(error, blocks), row_errors(error, whole))
    assert torch.equal(moment_diagonal(blocks), moment.diagonal())
    divided = moment_divided(whole, scale)
    torch.testing.assert_close(torch.block_diag(*moment_divided(blocks, scale)), divided)
    torch.testing.assert_close(divided, whole / torch.outer(scale, scale))
    shares = [saliency_shares(error, each, (0.1, 0.5)) for each in (blocks, whole)]
    torch.testing.assert_close(torch.tensor(shares[0]), torch.tensor(shares[1]))


def test_statistics_in_blocks_are_those_of_the_whole_gram() -> None:
    x = _case()[0]
    weight = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = finished(accumulate_(empty_statistics(24), x, token_weight=weight))
    blocks = finished(accumulate_(empty_statistics(24, group_size=GROUP), x, token_weight=weight))
    assert blocks.gram.shape == (3, GROUP, GROUP)
    torch.testing.assert_close(blocks.gram, in_blocks(whole, GROUP).gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        second_moment(blocks), diagonal_blocks(second_moment(whole), GROUP), rtol=1e-5, atol=1e-5
    )
    assert in_blocks(whole, 7) is whole
