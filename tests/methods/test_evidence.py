"""What the readers of an input are judged by: the metric's choices, the weight aimed at, and where it comes from."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from numerics.cases import correlated
from numerics.reference import correction
from torch import Tensor

from awqkit.methods.evidence import Evidence, MetricChoices, Readers, original_evidence, propagated_evidence
from awqkit.numerics.propagation import STRENGTHS
from awqkit.numerics.rounding_metric import energy_order, mean_damping, moment_order, own_damping
from awqkit.numerics.statistics import (
    PairedStatistics,
    Statistics,
    accumulate_,
    accumulate_paired_,
    cross_moment,
    empty_paired,
    empty_statistics,
    finished,
    finished_paired,
    second_moment,
)

CHANNELS = 24
OWN = MetricChoices("energy", "own", 0.05, 0.5)


def _of_copies(paired: PairedStatistics, *rest: Any, **named: Any) -> Evidence:
    """The evidence of statistics that are looked at again, which it would take the buffers of."""
    return propagated_evidence(deepcopy(paired), *rest, **named)


def _inputs(seed: int = 0, tokens: int = 200) -> Tensor:
    x = correlated(4, CHANNELS, tokens=400).inputs
    return x[torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:tokens]]


def _statistics(x: Tensor) -> Statistics:
    return finished(accumulate_(empty_statistics(CHANNELS), x))


def _paired(seed: int = 0, drift: float = 0.1) -> PairedStatistics:
    """x̂ is x mixed a little, the same way for every seed, plus noise."""
    x = _inputs(seed)
    mixing = torch.eye(CHANNELS) + drift * torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(9))
    noise = 0.1 * x.std(dim=0) * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return finished_paired(accumulate_paired_(empty_paired(CHANNELS), x, x @ mixing + noise))


def _readers() -> Readers:
    generator = torch.Generator().manual_seed(4)
    weights = tuple(torch.randn(rows, CHANNELS, generator=generator) for rows in (6, 3))
    return Readers(weights, tuple(torch.rand(len(weight), generator=generator) for weight in weights))


def test_rows_that_may_be_rescaled_count_by_what_they_cost() -> None:
    readers = _readers()
    rows = torch.cat(readers.row_weights)
    assert torch.equal(readers.row_weight, rows)
    expected = torch.zeros(CHANNELS, dtype=torch.float64)
    for weight, cost in zip(torch.cat(readers.weights).double(), rows.double(), strict=True):
        expected += cost * weight.square() / rows.double().sum()
    torch.testing.assert_close(readers.column_energy.double(), expected, rtol=1e-5, atol=0)
    full = Readers(readers.weights, tuple(torch.diag(row) + 0.1 for row in readers.row_weights))
    torch.testing.assert_close(full.row_weight, rows + 0.1)
    silent = Readers(readers.weights, tuple(torch.zeros_like(row) for row in readers.row_weights))
    assert bool(silent.column_energy.isfinite().all())


def test_without_a_choice_about_it_nothing_is_factorised() -> None:
    statistics = _statistics(_inputs())
    evidence = original_evidence(statistics, _readers(), None)
    assert evidence.metric is None
    assert torch.equal(evidence.moment, second_moment(statistics))
    weight = _readers().weights[0]
    assert torch.equal(evidence.target(weight), weight)


@pytest.mark.parametrize("order", ["energy", "moment"])
@pytest.mark.parametrize(("damping", "ratio"), [("own", 0.05), ("mean", 0.01)])
def test_the_metric_is_the_one_that_was_chosen(order: str, damping: str, ratio: float) -> None:
    statistics, readers = _statistics(_inputs()), _readers()
    metric = original_evidence(statistics, readers, MetricChoices(order, damping, ratio, 0.0)).metric
    moment = second_moment(statistics)
    orders = {"energy": energy_order(moment, readers.column_energy), "moment": moment_order(moment)}
    assert torch.equal(metric.order, orders[order])
    assert not torch.equal(orders["energy"], orders["moment"])
    added = own_damping if damping == "own" else mean_damping
    torch.testing.assert_close(metric.damping, added(moment, ratio, _readers().column_energy))


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_fixed_strength_moves_the_weight_by_that_share_of_the_correction(strength: float) -> None:
    paired, readers = _paired(), _readers()
    evidence = _of_copies(paired, None, readers, MetricChoices("energy", "own", 0.05, strength))
    assert evidence.strength == strength
    assert torch.equal(evidence.moment, second_moment(paired.quantized))
    weight = readers.weights[0]
    whole = correction(cross_moment(paired), evidence.moment, evidence.metric.damped)
    expected = weight.double() + strength * weight.double() @ whole
    torch.testing.assert_close(evidence.target(weight).double(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(evidence.target(weight), weight, atol=1e-2)


def _error_on(paired: PairedStatistics, readers: Readers, evidence: Evidence) -> float:
    """Σ_i r_i E‖W_i x − W*_i x̂‖² without the part that no target changes, in float64."""
    moment, cross = second_moment(paired.quantized).double(), cross_moment(paired).double()
    total = 0.0
    for place, (weight, rows) in enumerate(zip(readers.weights, readers.row_weights, strict=True)):
        target = evidence.target(weight, place).double()
        square = ((target @ moment) * target).sum(dim=1) - 2 * ((weight.double() @ cross) * target).sum(dim=1)
        total += float(square @ rows.double())
    return total


@pytest.mark.parametrize(("drift", "held_out_drift"), [(0.1, 0.1), (0.1, 0.05), (0.1, 0.0), (0.05, 0.1)])
def test_auto_takes_what_is_best_on_the_rows_held_out(drift: float, held_out_drift: float) -> None:
    paired, held_out, readers = _paired(0, drift), _paired(1, held_out_drift), _readers()
    found = _of_copies(paired, held_out, readers, MetricChoices("energy", "own", 0.05, "auto"))
    errors = {
        strength: _error_on(
            held_out,
            readers,
            _of_copies(paired, None, readers, MetricChoices("energy", "own", 0.05, strength)),
        )
        for strength in STRENGTHS
    }
    assert found.strength == min(errors, key=errors.__getitem__)
    weight = readers.weights[0]
    fixed = _of_copies(paired, None, readers, MetricChoices("energy", "own", 0.05, found.strength))
    torch.testing.assert_close(found.target(weight), fixed.target(weight), rtol=1e-4, atol=1e-5)


def test_few_rows_are_shifted_without_the_matrix_that_others_would_need() -> None:
    paired, readers, choices = _paired(0, 0.1), _readers(), MetricChoices("energy", "own", 0.05, 0.5)
    few = _of_copies(paired, None, readers, choices)
    matrix = _of_copies(paired, None, readers, choices, for_others=True)
    assert few.shift is None and few.targets is not None
    assert matrix.targets is None and matrix.shift is not None
    for place, weight in enumerate(readers.weights):
        assert not torch.equal(few.target(weight, place), weight)
        torch.testing.assert_close(few.target(weight, place), matrix.target(weight), rtol=1e-4, atol=1e-5)
        assert torch.equal(few.target(weight, place, slice(1, 3)), few.target(weight, place)[1:3])


def test_auto_differs_with_the_rows_held_out() -> None:
    choices = MetricChoices("energy", "own", 0.05, "auto")
    alike = _of_copies(_paired(0), _paired(1), _readers(), choices)
    other = _of_copies(_paired(0), _paired(1, 0.0), _readers(), choices)
    assert alike.strength > other.strength


def test_auto_with_no_rows_to_choose_on_makes_half_of_the_correction() -> None:
    choices = MetricChoices("energy", "own", 0.05, "auto")
    assert _of_copies(_paired(), None, _readers(), choices).strength == 0.5


def test_damping_that_had_to_be_raised_is_said() -> None:
    vector = torch.ones(CHANNELS)
    statistics = finished(accumulate_(empty_statistics(CHANNELS), vector.unsqueeze(0)))  # rank one
    readers = Readers((torch.randn(4, CHANNELS),), (torch.ones(4),))
    raised = original_evidence(statistics, readers, MetricChoices("moment", "mean", 0.0, 0.0)).raised
    assert raised is not None
    assert raised.startswith("H could not be factorised with a damping of 0: ")
    assert original_evidence(statistics, readers, MetricChoices("moment", "mean", 0.05, 0.0)).raised is None
