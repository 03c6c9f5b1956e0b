"""Refit of scales against least squares on a whole row, of zero points against all of them, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from numerics.cases import BF16, Case, correlated, error_of
from numerics.reference import objective, per_column, refit_row

from awqkit.kernels.replay import WaitingRefused
from awqkit.numerics.clip import search_clip
from awqkit.numerics.descent import descend
from awqkit.numerics.gptq import round_gptq
from awqkit.numerics.grid import Grid, QuantizedWeight, split_groups
from awqkit.numerics.output_error import diagonal_blocks
from awqkit.numerics.refit import GROUPS_AT_ONCE, refit
from awqkit.numerics.rounding import round_nearest, span_grid
from awqkit.numerics.rounding_metric import RoundingMetric, energy_order, rounding_metric

BITS = [2, 3, 4, 8]


def _metric(case: Case) -> RoundingMetric:
    return rounding_metric(case.moment, energy_order(case.moment, case.energy), 0.05)


def _start(case: Case, metric: RoundingMetric, bits: int, group_size: int, symmetric: bool) -> QuantizedWeight:
    return round_gptq(case.weight, case.grid(bits, group_size, symmetric=symmetric), metric)


@pytest.mark.parametrize("group_size", [8, 16, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_row_gets_its_least_squares_scales(bits: int, group_size: int) -> None:
    case = correlated(10, 32, seed=bits)
    metric = _metric(case)
    start = _start(case, metric, bits, group_size, True)
    found = refit(case.weight, start, metric, BF16)
    assert torch.equal(found.codes, start.codes)
    same = moved = 0
    for row in range(10):
        exact, kept = refit_row(
            case.weight[row].double(), start.codes[row].double(), start.grid.group_scale[row].double(),
            start.grid.group_zero[row].double(), group_size, metric.refinement_block(slice(None)).double(), BF16,
        )  # fmt: skip
        near = (found.grid.group_scale[row].double() - exact).abs() <= exact.abs() / 200
        same += bool(torch.equal(found.grid.group_scale[row].double(), kept) or near.all())
        moved += bool((found.grid.group_scale[row] != start.grid.group_scale[row]).any())
    assert same >= 9  # a row may hang on the border between two stored values
    assert moved >= 3


def test_more_groups_than_are_solved_at_once_still_never_raise_the_objective() -> None:
    case = correlated(6, 8 * (GROUPS_AT_ONCE + 6))
    metric = _metric(case)
    start = _start(case, metric, 3, 8, False)
    found = refit(case.weight, start, metric, BF16)
    errors = [objective(error_of(case.weight, entry), metric.refinement_block(slice(None))) for entry in (start, found)]
    assert errors[1] < errors[0]
    changed = (found.grid.group_scale != start.grid.group_scale).any(dim=0)
    assert bool(changed[:GROUPS_AT_ONCE].any())
    assert bool(changed[GROUPS_AT_ONCE:].any())


def test_the_best_zero_point_of_all_is_found_where_one_was_wrong() -> None:
    case = correlated(10, 32)
    metric, grid = _metric(case), case.grid(4, 16)
    codes = round_nearest(case.weight, grid).codes
    wrong = grid.group_zero.clone()
    wrong[:, 1] = (wrong[:, 1] + 3).clamp(max=15)
    off = QuantizedWeight(codes, replace(grid, group_zero=wrong))
    found = refit(case.weight, off, metric, BF16)
    for row in range(10):
        errors = {}
        for zero in range(16):
            tried = found.grid.group_zero.clone()
            tried[row, 1] = zero
            entry = QuantizedWeight(codes, replace(found.grid, group_zero=tried))
            errors[zero] = objective(error_of(case.weight, entry), metric.refinement_block(slice(None)))
        assert errors[int(found.grid.group_zero[row, 1])] <= min(errors.values()) * (1 + 1e-6)


def test_zero_points_move_where_they_were_wrong() -> None:
    case = correlated(10, 32)
    metric, grid = _metric(case), case.grid(4, 16)
    codes = round_nearest(case.weight, grid).codes
    off = Grid(4, 16, False, grid.group_scale, (grid.group_zero + 2).clamp(max=15))
    found = refit(case.weight, QuantizedWeight(codes, off), metric, BF16)
    assert bool((found.grid.group_zero != off.group_zero).any())
    with WaitingRefused():  # where nobody may look if they still move, as in a graph
        unlooked = refit(case.weight, QuantizedWeight(codes, off), metric, BF16)
    assert torch.equal(unlooked.grid.group_zero, found.grid.group_zero)
    errors = [
        objective(error_of(case.weight, entry), metric.refinement_block(slice(None)))
        for entry in (QuantizedWeight(codes, off), found)
    ]
    assert errors[1] < 0.3 * errors[0]


def test_a_symmetric_grid_keeps_its_zero_point_even_where_another_would_be_better() -> None:
    case = correlated(10, 32)
    metric, grid = _metric(case), case.grid(4, 16, symmetric=True)
    shifted = (round_nearest(case.weight, grid).codes + 2).clamp(max=15)
    found = refit(case.weight, QuantizedWeight(shifted, grid), metric, BF16).grid
    assert torch.equal(found.group_zero, grid.group_zero)
    free = replace(grid, symmetric=False)
    assert bool((refit(case.weight, QuantizedWeight(shifted, free), metric, BF16).grid.group_zero > 8).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_new_grid_is_one_that_a_file_can_hold(symmetric: bool, dtype: torch.dtype) -> None:
    case = correlated(16, 64)
    metric = _metric(case)
    grid = span_grid(case.weight, bits=3, group_size=16, symmetric=symmetric, stored_dtype=dtype)
    found = refit(case.weight, round_gptq(case.weight, grid, metric), metric, dtype).grid
    assert (found.bits, found.group_size, found.symmetric) == (3, 16, symmetric)
    assert found.group_scale.shape == found.group_zero.shape == (16, 4)
    assert torch.equal(found.group_scale.to(dtype).float(), found.group_scale)
    assert bool((found.group_scale > 0).all())
    assert torch.equal(found.group_zero, found.group_zero.round().clamp(0, 7))
    assert not symmetric or bool((found.group_zero == 4).all())


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 96])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_descent_and_refit_in_turn_never_raise_the_objective(
    bits: int, symmetric: bool, group_size: int, clipped: bool
) -> None:
    case = correlated(12, 96, seed=bits)
    metric = _metric(case)
    choices = {"bits": bits, "symmetric": symmetric, "stored_dtype": BF16}
    ratios = (None, None)
    if clipped:
        grouped = split_groups(case.weight, group_size)
        ratios = search_clip(grouped, diagonal_blocks(case.moment, group_size), separate_ends=True, **choices)
    grid = span_grid(case.weight, group_size=group_size, ratio_low=ratios[0], ratio_high=ratios[1], **choices)
    chosen = [round_gptq(case.weight, grid, metric)]
    for _ in range(4):
        chosen.append(descend(case.weight, chosen[-1], metric))
        chosen.append(refit(case.weight, chosen[-1], metric, BF16))
    errors = [objective(error_of(case.weight, entry), metric.refinement_block(slice(None))) for entry in chosen]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[2] < errors[0] * 0.999
    assert errors[-1] < errors[2]


def test_a_refit_of_rows_that_are_all_zero_or_exact_leaves_them() -> None:
    case = correlated(8, 32)
    case.weight[0] = 0.0
    metric, grid = _metric(case), case.grid(4, 16)
    codes = round_nearest(case.weight, grid).codes
    scale, zero = (per_column(value, 16).float() for value in (grid.group_scale, grid.group_zero))
    exact = (codes - zero) * scale
    found = refit(exact, QuantizedWeight(codes, grid), metric, BF16)
    assert torch.equal(found.grid.group_scale, grid.group_scale)
    assert torch.equal(found.grid.group_zero, grid.group_zero)


def test_what_is_given_is_not_written_to() -> None:
    case = correlated(8, 32)
    metric = _metric(case)
    start = _start(case, metric, 4, 16, False)
    given = (case.weight, start.codes, start.grid.group_scale, start.grid.group_zero, metric.moment)
    saved = [value.clone() for value in given]
    refit(case.weight, start, metric, BF16)
    assert all(torch.equal(a, b) for a, b in zip(saved, given, strict=True))
