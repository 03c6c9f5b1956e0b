"""The factor, the conditional variance and the order against explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from numerics.cases import correlated
from numerics.reference import conditional_variance
from torch import Tensor

from awqkit.numerics import rounding_metric as rounding_metric_module
from awqkit.numerics.rounding_metric import (
    RoundingMetric,
    energy_order,
    mean_damping,
    moment_order,
    own_damping,
    rounding_metric,
)

ORDERS = ["energy", "moment", "reversed"]


def _order(name: str, moment: Tensor, energy: Tensor) -> Tensor:
    if name == "reversed":
        return torch.arange(len(moment)).flip(0)
    return energy_order(moment, energy) if name == "energy" else moment_order(moment)


def _metric(order: str = "energy", damping: str = "own", ratio: float = 0.05, columns: int = 40) -> RoundingMetric:
    case = correlated(8, columns)
    return rounding_metric(case.moment, _order(order, case.moment, case.energy), ratio, damping)


@pytest.mark.parametrize("damping", ["own", "mean"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_factor_is_the_upper_root_of_the_inverse(order: str, damping: str) -> None:
    metric = _metric(order, damping)
    assert torch.equal(metric.factor, metric.factor.triu())
    assert bool((metric.factor.diagonal() > 0).all())
    damped = metric.damped.double()[metric.order][:, metric.order]
    product = metric.factor.double().t() @ metric.factor.double() @ damped
    torch.testing.assert_close(product, torch.eye(40, dtype=torch.float64), rtol=0, atol=2e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_the_variance_is_conditional_on_the_columns_that_come_later(order: str) -> None:
    metric = _metric(order)
    expected = conditional_variance(metric.damped, metric.order)
    torch.testing.assert_close(metric.variance.double(), expected, rtol=1e-3, atol=0)
    diagonal = metric.damped.diagonal()
    assert bool((metric.variance <= diagonal * 1.0001).all())
    last = metric.order[-1]  # nothing comes after it
    torch.testing.assert_close(metric.variance[last], diagonal[last], rtol=1e-4, atol=0)


def test_damping_is_a_share_of_each_channel_or_of_the_mean() -> None:
    diagonal = torch.tensor([4.0, 1.0, 0.0])
    moment = torch.diag(diagonal)
    assert own_damping(moment, 0.5)[:2].tolist() == [2.0, 0.5]
    assert 0 < float(own_damping(moment, 0.5)[2]) < 1e-6
    torch.testing.assert_close(mean_damping(moment, 0.3), torch.full((3,), 0.5))
    metric = rounding_metric(moment, torch.arange(3), 0.5)
    assert torch.equal(metric.damped, moment + torch.diag(metric.damping))


def test_solving_is_the_product_with_the_inverse() -> None:
    metric = _metric("moment")
    right = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    expected = right.double() @ torch.linalg.inv(metric.damped.double())
    torch.testing.assert_close(
        metric.solve(right).double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


def _scale(columns: int = 40) -> Tensor:
    return torch.exp(1.5 * torch.randn(columns, generator=torch.Generator().manual_seed(2)))


def test_a_scaled_metric_is_the_metric_of_the_scaled_input() -> None:
    s = _scale()
    metric = _metric()
    found = metric.scaled(s)
    fresh = rounding_metric(metric.moment / s / s[:, None], metric.order, 0.05)
    assert torch.equal(found.order, fresh.order)
    torch.testing.assert_close(
        found.refinement_block(slice(None)), metric.refinement_block(slice(None)) / s / s[:, None]
    )
    torch.testing.assert_close(found.damping, fresh.damping)
    torch.testing.assert_close(found.rounding_factor(slice(None)), fresh.factor, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.variance, metric.variance / s.square(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.damped, metric.damped / s / s[:, None])


@pytest.mark.parametrize("scaled", [False, True])
def test_what_refinement_reads_of_h_is_part_of_one_matrix(scaled: bool) -> None:
    metric = _metric().scaled(_scale()) if scaled else _metric()
    whole, columns = metric.refinement_block(slice(None)), slice(10, 30)
    error = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(metric.refinement_block(columns), whole[columns, columns])
    torch.testing.assert_close(metric.ordered_refinement_rows(columns), whole[metric.order][columns][:, metric.order])
    torch.testing.assert_close(metric.pushed(error), error @ whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metric.pushed(error[:, columns], columns), error[:, columns] @ whole[columns])
    sums = whole.reshape(8, 5, 8, 5).sum(dim=(1, 3))
    torch.testing.assert_close(metric.refinement_sums(8), sums, rtol=1e-4, atol=1e-4)


def test_the_energy_order_is_indifferent_to_a_channel_scale_and_act_order_is_not() -> None:
    case, s = correlated(8, 40), _scale()
    scaled = case.moment / s / s[:, None]
    assert torch.equal(energy_order(scaled, case.energy * s.square()), energy_order(case.moment, case.energy))
    assert not torch.equal(moment_order(scaled), moment_order(case.moment))
    cost = (case.moment.diagonal() * case.energy)[energy_order(case.moment, case.energy)]
    assert bool((cost[:-1] >= cost[1:]).all())
    first = moment_order(case.moment)[0]
    assert float(case.moment[first, first]) == float(case.moment.diagonal().max())


@pytest.mark.parametrize("damping", ["own", "mean"])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("kind", ["rank one", "few tokens", "dead channels", "all zero", "one outlier", "twins"])
def test_a_deficient_moment_gets_a_finite_factor_and_says_what_it_took(kind: str, ratio: float, damping: str) -> None:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    if kind == "rank one":
        x = x[:1]
    elif kind == "few tokens":
        x = x[:7]
    elif kind == "dead channels":
        x[:, 3:9] = 0.0
    elif kind == "all zero":
        x = torch.zeros_like(x)
    elif kind == "one outlier":
        x[:, 5] *= 1e6
    else:
        x[:, 16:] = x[:, :16]
    moment = x.t() @ x / len(x)
    metric = rounding_metric(moment, moment_order(moment), ratio, damping)
    assert metric.damp_ratio >= ratio
    assert bool(metric.factor.isfinite().all())
    assert bool(metric.variance.isfinite().all())
    assert bool((metric.variance > 0).all())
    assert bool((metric.damping >= 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(value: float) -> None:
    moment = correlated(8, 12).moment
    moment[3, 3] = value
    with pytest.raises(ValueError, match="12 channels"):
        rounding_metric(moment, torch.arange(12), 0.05)


def test_own_damping_is_a_share_of_each_channel_and_a_floor_by_what_a_column_contributes() -> None:
    moment = torch.diag(torch.tensor([4.0, 1.0, 1e-8]))
    energy = torch.tensor([0.5, 2.0, 1.0])
    floor = 1e-4 * float((moment.diagonal() * energy).mean()) / energy
    torch.testing.assert_close(own_damping(moment, 0.05, energy), 0.05 * moment.diagonal() + floor)


def test_own_damping_follows_a_channel_scale() -> None:
    generator = torch.Generator().manual_seed(5)
    moment = torch.diag(torch.rand(12, generator=generator))
    energy, scale = torch.rand(12, generator=generator) + 0.1, torch.rand(12, generator=generator) + 0.5
    scaled = own_damping(moment / scale.unsqueeze(0) / scale.unsqueeze(1), 0.05, energy * scale.square())
    torch.testing.assert_close(scaled, own_damping(moment, 0.05, energy) / scale.square())


def test_an_inverse_by_halves_is_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_metric_module, "_SOLVED_AT_ONCE", 5)
    lower = torch.randn(37, 37, generator=torch.Generator().manual_seed(1)).tril() + 6 * torch.eye(37)
    found = rounding_metric_module._inverted_(lower.clone())
    torch.testing.assert_close(found.double(), torch.linalg.inv(lower.double()), rtol=1e-4, atol=1e-6)
    assert not bool(found.triu(1).any())
