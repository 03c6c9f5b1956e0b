"""The correction for the quantized stream's input against explicit inverses and least squares in float64."""

from __future__ import annotations

import pytest
import torch
from numerics import reference
from numerics.cases import correlated
from torch import Tensor

from awqkit.numerics.propagation import STRENGTHS, best_strength, correction
from awqkit.numerics.rounding_metric import energy_order, moment_order, rounding_metric


def _streams(columns: int = 24, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and x̂ = x with errors that depend on x, `[tokens, in]` each."""
    x = correlated(4, columns, tokens=tokens).inputs  # mixed by the same sources whatever the seed
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=torch.Generator().manual_seed(5))
    x = x[torch.randperm(tokens, generator=generator)[: tokens // 2]]
    return x, x @ mixing + 0.1 * x.std(dim=0) * torch.randn(x.shape, generator=generator)


def _moments(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """C and Ĥ."""
    return x.t() @ x_hat / len(x), x_hat.t() @ x_hat / len(x)


@pytest.mark.parametrize("damping", ["own", "mean"])
@pytest.mark.parametrize("ratio", [0.0, 0.05])
def test_the_correction_is_the_difference_times_the_inverse(ratio: float, damping: str) -> None:
    cross, moment = _moments(*_streams())
    metric = rounding_metric(moment, moment_order(moment), ratio, damping)
    expected = reference.correction(cross, moment, metric.damped)
    found = correction(cross, metric)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_whole_correction_without_damping_is_the_least_squares_answer() -> None:
    x, x_hat = _streams()
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    cross, moment = _moments(x, x_hat)
    metric = rounding_metric(moment, moment_order(moment), 0.0)
    target = weight + weight @ correction(cross, metric)
    expected = torch.linalg.lstsq(x_hat.double(), x.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(target.double(), expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
    assert not torch.allclose(target, weight, rtol=0.05, atol=0.02)


def test_equal_streams_need_no_correction() -> None:
    x, _ = _streams()
    moment = x.t() @ x / len(x)
    metric = rounding_metric(moment, moment_order(moment), 0.05)
    assert torch.equal(correction(moment, metric), torch.zeros(24, 24))


def _strength(rows: list[Tensor], held_out: tuple[Tensor, Tensor], shift: Tensor) -> tuple[float, list[float]]:
    """What `best_strength` says, and the true error of every strength on the held-out tokens."""
    x, x_hat = held_out
    weights = [torch.randn(len(row), 24, generator=torch.Generator().manual_seed(len(row))) for row in rows]
    found = best_strength(weights, rows, shift, *_moments(x, x_hat))
    errors = []
    for strength in STRENGTHS:
        total = 0.0
        for weight, row in zip(weights, rows, strict=True):
            target = weight.double() + strength * weight.double() @ shift.double()
            change = x.double() @ weight.double().t() - x_hat.double() @ target.t()
            total += float((change.square() * row.double()).sum())
        errors.append(total)
    return found, errors


@pytest.mark.parametrize("overshoot", [-1.0, 0.6, 1.0, 1.5, 2.1, 5.0, 40.0])
def test_auto_takes_the_strength_with_the_least_error_on_held_out_tokens(overshoot: float) -> None:
    cross, moment = _moments(*_streams(seed=1))
    metric = rounding_metric(moment, moment_order(moment), 0.05)
    shift = overshoot * correction(cross, metric)
    rows = [torch.rand(5, generator=torch.Generator().manual_seed(3)), torch.ones(3)]
    found, errors = _strength(rows, _streams(seed=2), shift)
    assert found == STRENGTHS[errors.index(min(errors))]


def test_strengths_of_different_corrections_differ() -> None:
    cross, moment = _moments(*_streams(seed=1))
    shift = correction(cross, rounding_metric(moment, moment_order(moment), 0.05))
    found = [_strength([torch.ones(4)], _streams(seed=2), factor * shift)[0] for factor in (-1.0, 1.0, 2.0, 40.0)]
    assert found[0] == found[3] == 0.0
    assert found[1] == 1.0
    assert found[2] == 0.5


def test_rows_that_cost_nothing_have_no_say() -> None:
    cross, moment = _moments(*_streams(seed=1))
    held_cross, held_moment = _moments(*_streams(seed=2))
    shift = correction(cross, rounding_metric(moment, moment_order(moment), 0.05))
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    assert best_strength([weight], [torch.zeros(8)], shift, held_cross, held_moment) == 0.0
    assert best_strength([weight], [torch.ones(8)], torch.zeros(24, 24), held_cross, held_moment) == 0.0
    assert best_strength([weight], [torch.ones(8)], shift, held_cross, held_moment) > 0.0


def test_a_channel_of_nearly_no_energy_is_not_given_weights_far_beyond_its_own() -> None:
    """Its column of W* once was hundreds of times W's, and took its whole group's range with it."""
    generator = torch.Generator().manual_seed(3)
    original = torch.randn(400, 24, generator=generator)
    quantized = original + 0.05 * torch.randn(400, 24, generator=generator)
    quantized[:, 5] = 1e-4 * (original - quantized)[:, 3]  # tells the error of a neighbour
    original[:, 5] = quantized[:, 5]
    weight = torch.randn(16, 24, generator=generator)
    moment, cross = (quantized.t() @ quantized) / 400, (original.t() @ quantized) / 400
    energy = weight.square().mean(dim=0)
    metric = rounding_metric(moment, energy_order(moment, energy), 0.05, "own", energy)
    change = (weight @ correction(cross, metric)).abs().amax(dim=0)
    assert float(change[5]) < 2 * float(weight[:, 5].abs().max())
    bare = rounding_metric(moment, energy_order(moment, energy), 0.05)
    assert float((weight @ correction(cross, bare)).abs().amax(dim=0)[5]) > 100
