"""GPTQ against the textbook recursion in float64: an explicit inverse of what is still free, for every column."""

from __future__ import annotations

import pytest
import torch
from numerics.cases import Case, correlated, error_of
from numerics.reference import equal_up_to_ties, gptq, objective, per_column

from awqkit.numerics.gptq import COLUMN_BLOCK, round_gptq
from awqkit.numerics.grid import Grid
from awqkit.numerics.rounding import round_nearest
from awqkit.numerics.rounding_metric import RoundingMetric, energy_order, moment_order, rounding_metric

BITS = [2, 3, 4, 8]


def _tolerance(bits: int) -> float:
    """In steps; float32 keeps seven digits of a value of up to 2^bits steps."""
    return max(1e-3, 2.0**bits * 4e-5)


def _metric(case: Case, order: str = "energy") -> RoundingMetric:
    by_energy = order == "energy"
    found = energy_order(case.moment, case.energy) if by_energy else moment_order(case.moment)
    return rounding_metric(case.moment, found, 0.05 if by_energy else 0.01, "own" if by_energy else "mean")


def _reference(case: Case, grid: Grid, metric: RoundingMetric) -> tuple[torch.Tensor, torch.Tensor]:
    scale, zero = per_column(grid.group_scale, grid.group_size), per_column(grid.group_zero, grid.group_size)
    return gptq(case.weight, scale, zero, grid.bits, metric.damped, metric.order)


@pytest.mark.parametrize("order", ["energy", "moment"])
@pytest.mark.parametrize("group_size", [8, 16, 48])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_the_textbook_recursion(bits: int, symmetric: bool, group_size: int, order: str) -> None:
    case = correlated(24, 48, seed=bits)
    grid, metric = case.grid(bits, group_size, symmetric=symmetric), _metric(case, order)
    found = round_gptq(case.weight, grid, metric)
    expected, margin = _reference(case, grid, metric)
    assert found.codes.dtype == torch.uint8
    assert found.grid is grid
    assert equal_up_to_ties(found.codes, expected, margin, metric.order, _tolerance(bits))
    assert float((found.codes == expected).double().mean()) > 0.97
    assert float((found.codes != round_nearest(case.weight, grid).codes).double().mean()) > 0.1


def test_lazy_updates_over_several_blocks_of_columns_change_nothing() -> None:
    columns = COLUMN_BLOCK + 64
    case = correlated(6, columns)
    grid, metric = case.grid(4, 64), _metric(case)
    expected, margin = _reference(case, grid, metric)
    found = round_gptq(case.weight, grid, metric)
    assert equal_up_to_ties(found.codes, expected, margin, metric.order, 2e-3)
    assert float((found.codes == expected).double().mean()) > 0.95


@pytest.mark.parametrize("bits", BITS)
def test_it_beats_nearest_rounding_where_inputs_are_correlated(bits: int) -> None:
    case = correlated(64, 96, seed=bits)
    grid, metric = case.grid(bits, 32), _metric(case)
    errors = [
        objective(error_of(case.weight, quantized), metric.damped)
        for quantized in (round_gptq(case.weight, grid, metric), round_nearest(case.weight, grid))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_without_correlations_it_is_nearest_rounding() -> None:
    case = correlated(16, 32)
    moment = torch.diag(case.moment.diagonal())
    metric = rounding_metric(moment, energy_order(moment, case.energy), 0.05)
    grid = case.grid()
    assert torch.equal(round_gptq(case.weight, grid, metric).codes, round_nearest(case.weight, grid).codes)


def test_a_weight_on_the_grid_stays_there() -> None:
    case = correlated(16, 32)
    grid = case.grid()
    codes = torch.randint(0, 16, (16, 32), generator=torch.Generator().manual_seed(0))
    scale, zero = (per_column(value, 16).float() for value in (grid.group_scale, grid.group_zero))
    found = round_gptq((codes - zero) * scale, grid, _metric(case))
    assert torch.equal(found.codes, codes.to(torch.uint8))


def test_rows_do_not_meet_and_nothing_is_written_to() -> None:
    case = correlated(16, 32)
    grid, metric = case.grid(), _metric(case)
    saved = [value.clone() for value in (case.weight, metric.factor, grid.group_scale, grid.group_zero)]
    whole = round_gptq(case.weight, grid, metric).codes
    part = Grid(4, 16, False, grid.group_scale[3:7], grid.group_zero[3:7])
    assert torch.equal(round_gptq(case.weight[3:7], part, metric).codes, whole[3:7])
    after = (case.weight, metric.factor, grid.group_scale, grid.group_zero)
    assert all(torch.equal(a, b) for a, b in zip(saved, after, strict=True))
