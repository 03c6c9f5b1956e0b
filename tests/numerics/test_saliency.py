"""The share of the output error that the most salient channels carry, against zeroed columns in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from awqkit.numerics.saliency import saliency_shares

SHARES = (0.001, 0.01, 0.05, 0.1, 1.0)


def made(rows: int = 24, columns: int = 70, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An error, and H of correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs[:, ::17] *= 12.0
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs / len(inputs)


def slow_share(error: Tensor, moment: Tensor, channels: int) -> float:
    """1 − tr(E' H E'ᵀ) / tr(E H Eᵀ), row by row in float64."""
    energy = [float(moment[j, j]) for j in range(len(moment))]
    salient = sorted(range(len(energy)), key=lambda j: -energy[j])[:channels]
    total, left = 0.0, 0.0
    for row in error.double():
        zeroed = row.clone()
        zeroed[salient] = 0.0
        total += float(row @ moment.double() @ row)
        left += float(zeroed @ moment.double() @ zeroed)
    return 1.0 - left / total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_are_those_of_zeroed_columns(seed: int) -> None:
    error, moment = made(seed=seed)
    found = saliency_shares(error, moment, SHARES)
    assert [share for share, _ in found] == list(SHARES)
    for channels, share in found:
        assert share == pytest.approx(slow_share(error, moment, math.ceil(channels * 70)), rel=1e-4, abs=1e-5)
    assert found[-1][1] == pytest.approx(1.0, abs=1e-5)  # all channels carry all of it


def test_the_salient_channels_are_those_with_the_largest_inputs() -> None:
    error, moment = torch.ones(3, 40), torch.eye(40)
    moment[7, 7] = 61.0  # 61 of 100 parts of the error
    assert saliency_shares(error, moment, (0.01,))[0] == (0.01, pytest.approx(0.61))


def test_errors_that_cancel_give_a_negative_share() -> None:
    error = torch.tensor([[1.0, -1.0]])
    moment = torch.tensor([[1.01, 0.9], [0.9, 1.0]])
    assert saliency_shares(error, moment, (0.5,))[0][1] == pytest.approx(1 - 1.0 / 0.21, rel=1e-4)


def test_no_error_has_no_shares() -> None:
    _, moment = made()
    assert saliency_shares(torch.zeros(24, 70), moment, SHARES) == tuple((share, 0.0) for share in SHARES)
    assert saliency_shares(made()[0], torch.zeros(70, 70), (0.1,)) == ((0.1, 0.0),)


def test_many_rows_are_sampled_evenly() -> None:
    error, moment = made(rows=1500)
    assert saliency_shares(error, moment, SHARES) == saliency_shares(error[::3], moment, SHARES)
    whole = slow_share(error, moment, 7)
    assert saliency_shares(error, moment, (0.1,))[0][1] == pytest.approx(whole, abs=0.05)


def test_what_is_given_stays_as_it_is() -> None:
    error, moment = made()
    before = error.clone(), moment.clone()
    saliency_shares(error, moment, SHARES)
    assert torch.equal(error, before[0])
    assert torch.equal(moment, before[1])
