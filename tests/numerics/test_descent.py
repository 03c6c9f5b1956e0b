"""Coordinate descent against trying every code of every weight, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from numerics.cases import Case, correlated, error_of
from numerics.reference import descent_sweep, equal_up_to_ties, objective, per_column

from awqkit.numerics import gptq
from awqkit.numerics.descent import descend
from awqkit.numerics.gptq import COLUMN_BLOCK, round_gptq
from awqkit.numerics.grid import QuantizedWeight
from awqkit.numerics.rounding import round_nearest
from awqkit.numerics.rounding_metric import RoundingMetric, energy_order, rounding_metric

BITS = [2, 3, 4, 8]


def _metric(case: Case) -> RoundingMetric:
    return rounding_metric(case.moment, energy_order(case.moment, case.energy), 0.05)


def _start(case: Case, metric: RoundingMetric, kind: str, bits: int, group_size: int, symmetric: bool):
    grid = case.grid(bits, group_size, symmetric=symmetric)
    if kind == "gptq":
        return round_gptq(case.weight, grid, metric)
    if kind == "nearest":
        return round_nearest(case.weight, grid)
    codes = torch.randint(0, 2**bits, case.weight.shape, generator=torch.Generator().manual_seed(bits))
    return QuantizedWeight(codes.to(torch.uint8), grid)


@pytest.mark.parametrize("kind", ["nearest", "random"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 12), (3, 24), (4, 12), (4, 24)])
def test_a_sweep_gives_every_weight_the_best_of_all_its_codes(
    bits: int, group_size: int, symmetric: bool, kind: str
) -> None:
    case = correlated(8, 24, seed=bits)
    metric = _metric(case)
    start = _start(case, metric, kind, bits, group_size, symmetric)
    grid = start.grid
    scale, zero = per_column(grid.group_scale, group_size), per_column(grid.group_zero, group_size)
    expected, margin = descent_sweep(
        case.weight, start.codes, scale, zero, bits, metric.refinement_block(slice(None)), metric.order
    )
    found = descend(case.weight, start, metric)
    assert found.grid is grid
    assert equal_up_to_ties(found.codes, expected, margin, metric.order, 1e-3)
    assert float((found.codes == expected).double().mean()) > 0.97
    assert not torch.equal(found.codes, start.codes)


@pytest.mark.parametrize("kind", ["gptq", "nearest", "random"])
@pytest.mark.parametrize("group_size", [16, 48, 96])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_no_sweep_raises_the_objective(bits: int, symmetric: bool, group_size: int, kind: str) -> None:
    case = correlated(12, 96, seed=bits)
    metric = _metric(case)
    chosen = [_start(case, metric, kind, bits, group_size, symmetric)]
    for _ in range(4):
        chosen.append(descend(case.weight, chosen[-1], metric))
    errors = [objective(error_of(case.weight, entry), metric.refinement_block(slice(None))) for entry in chosen]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < errors[0] * (0.9995 if kind == "gptq" else 0.9)
    assert int(chosen[-1].codes.max()) <= 2**bits - 1


def test_residuals_carried_over_several_blocks_of_columns_change_nothing() -> None:
    case = correlated(4, COLUMN_BLOCK + 40)
    metric = _metric(case)
    start = _start(case, metric, "nearest", 3, 24, False)
    scale, zero = per_column(start.grid.group_scale, 24), per_column(start.grid.group_zero, 24)
    expected, margin = descent_sweep(
        case.weight, start.codes, scale, zero, 3, metric.refinement_block(slice(None)), metric.order
    )
    found = descend(case.weight, start, metric)
    assert equal_up_to_ties(found.codes, expected, margin, metric.order, 1e-3)
    assert float((found.codes == expected).double().mean()) > 0.97


def test_chunks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = correlated(4, 3 * COLUMN_BLOCK)
    metric = _metric(case)
    whole = [_start(case, metric, "gptq", 3, 24, False)]
    whole.append(descend(case.weight, whole[0], metric))
    monkeypatch.setattr(gptq, "_CHUNK_VALUES", COLUMN_BLOCK * 3 * COLUMN_BLOCK)
    assert [chunk.stop for chunk in gptq.column_chunks(3 * COLUMN_BLOCK, 4)] == [128, 256, 384]
    again = _start(case, metric, "gptq", 3, 24, False)
    assert torch.equal(again.codes, whole[0].codes)
    assert torch.equal(descend(case.weight, again, metric).codes, whole[1].codes)


def test_where_no_single_move_helps_nothing_moves() -> None:
    case = correlated(6, 48)
    metric = _metric(case)
    settled = _start(case, metric, "nearest", 4, 16, False)
    for _ in range(50):
        settled = descend(case.weight, settled, metric)
    again = descend(case.weight, settled, metric)
    assert torch.equal(again.codes, settled.codes)


def test_what_is_given_is_not_written_to() -> None:
    case = correlated(6, 48)
    metric = _metric(case)
    start = _start(case, metric, "nearest", 4, 16, False)
    saved = [value.clone() for value in (case.weight, start.codes, metric.moment, metric.damping)]
    descend(case.weight, start, metric)
    after = (case.weight, start.codes, metric.moment, metric.damping)
    assert all(torch.equal(a, b) for a, b in zip(saved, after, strict=True))
