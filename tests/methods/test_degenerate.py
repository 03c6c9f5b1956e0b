"""Inputs and weights at the edge: finite results, and never worse than nearest rounding by the same objective."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from numerics.cases import correlated
from numerics.reference import objective, two_sided_objective
from torch import Tensor

from awqkit import Recipe
from awqkit.methods.evidence import Evidence, MetricChoices, Readers, original_evidence, propagated_evidence
from awqkit.methods.fold import ScaleChoices, Tied, begin_channel_scale
from awqkit.methods.linear import QuantizedLinear, ScaledWeight, begin_linear, round_plainly
from awqkit.methods.plan import LinearPlan
from awqkit.methods.rows import sensitive_rounder
from awqkit.numerics.grid import dequantize
from awqkit.numerics.statistics import (
    Statistics,
    accumulate_,
    accumulate_paired_,
    empty_paired,
    empty_statistics,
    finished,
    finished_paired,
)

ROWS, COLUMNS = 24, 64
RECIPES = {
    "fast": Recipe.preset("fast"),
    "balanced": Recipe.preset("balanced"),
    "best": Recipe.preset("best"),
    "awq": Recipe.method("awq", alpha_search="layer"),
    "gptq": Recipe.method("gptq"),
}


@dataclass(frozen=True, slots=True)
class Edge:
    """What is wrong with a weight `[out, in]` and the inputs `[tokens, in]`."""

    weight: Tensor
    inputs: Tensor


def _rank_deficient(weight: Tensor, x: Tensor) -> Edge:
    return Edge(weight, x[:5])


def _one_token(weight: Tensor, x: Tensor) -> Edge:
    return Edge(weight, x[:1])


def _dead_channels(weight: Tensor, x: Tensor) -> Edge:
    x[:, 5:9] = 0.0
    x[:, 16:32] = 0.0
    return Edge(weight, x)


def _nothing_arrives(weight: Tensor, x: Tensor) -> Edge:
    return Edge(weight, torch.zeros_like(x))


def _twin_channels(weight: Tensor, x: Tensor) -> Edge:
    x[:, COLUMNS // 2 :] = x[:, : COLUMNS // 2]
    return Edge(weight, x)


def _zero_rows_and_columns(weight: Tensor, x: Tensor) -> Edge:
    weight[3] = 0.0
    weight[7, :16] = 0.0
    weight[:, 40] = 0.0
    return Edge(weight, x)


def _all_zero_weight(weight: Tensor, x: Tensor) -> Edge:
    return Edge(torch.zeros_like(weight), x)


def _outlier_input(weight: Tensor, x: Tensor) -> Edge:
    x[:, 11] *= 1e6
    return Edge(weight, x)


def _outlier_token(weight: Tensor, x: Tensor) -> Edge:
    x[17] *= 1e5
    return Edge(weight, x)


def _outlier_weight(weight: Tensor, x: Tensor) -> Edge:
    weight[2, 20] = 1e5
    return Edge(weight, x)


def _tiny_numbers(weight: Tensor, x: Tensor) -> Edge:
    return Edge(weight * 1e-12, x * 1e-12)


def _constant(weight: Tensor, x: Tensor) -> Edge:
    return Edge(torch.full_like(weight, 0.3), torch.ones_like(x))


EDGES: dict[str, Callable[[Tensor, Tensor], Edge]] = {
    function.__name__[1:]: function
    for function in (
        _rank_deficient, _one_token, _dead_channels, _nothing_arrives, _twin_channels, _zero_rows_and_columns,
        _all_zero_weight, _outlier_input, _outlier_token, _outlier_weight, _tiny_numbers, _constant,
    )
}  # fmt: skip


def _edge(name: str) -> Edge:
    case = correlated(ROWS, COLUMNS, tokens=100)
    return EDGES[name](case.weight, case.inputs)


def _plan(recipe: Recipe, bits: int, group_size: int, symmetric: bool) -> LinearPlan:
    return LinearPlan(
        "m", (ROWS, COLUMNS), bits, group_size, symmetric, torch.bfloat16, recipe.clip, recipe.rounding,
        recipe.error_weight, recipe.refinement, recipe.rounds,
    )  # fmt: skip


def _choices(recipe: Recipe, plan: LinearPlan) -> MetricChoices | None:
    choices = MetricChoices(recipe.column_order, recipe.damping, recipe.damp_ratio, recipe.propagation)
    return choices if plan.needs_factor else None


def _statistics(x: Tensor) -> Statistics:
    return finished(accumulate_(empty_statistics(x.shape[1]), x))


def _check(found: QuantizedLinear, scaled: ScaledWeight, evidence: Evidence) -> None:
    """Everything is finite, and the error on the input that it gets is not above nearest rounding's."""
    grid = found.quantized.grid
    for tensor in (found.restored, grid.group_scale, grid.group_zero):
        assert bool(tensor.isfinite().all())
    assert bool((grid.group_scale > 0).all())
    nearest = round_plainly(scaled.weight, found.plan)
    plain = scaled.restored(dequantize(nearest.codes, nearest.grid))
    errors = [objective(each - scaled.target, evidence.moment) for each in (plain, found.restored)]
    energy = objective(scaled.target, evidence.moment)
    assert errors[1] <= errors[0] * (1 + 1e-4) + 1e-9 * energy
    decision = found.decision
    for value in (decision.output_error, decision.output_error_nearest, decision.weight_error, decision.clip_mean):
        assert value == value and abs(value) < float("inf")


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(2, 16, False), (4, 16, True), (3, 64, False)])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("edge", EDGES)
def test_a_linear_is_finite_and_never_worse_than_nearest_rounding(
    edge: str, recipe: str, bits: int, group_size: int, symmetric: bool
) -> None:
    case, plan = _edge(edge), _plan(RECIPES[recipe], bits, group_size, symmetric)
    readers = Readers((case.weight,), (torch.ones(ROWS),))
    evidence = original_evidence(_statistics(case.inputs), readers, _choices(RECIPES[recipe], plan))
    scaled = ScaledWeight.unscaled(case.weight)
    _check(begin_linear(scaled, evidence, plan)(), scaled, evidence)


@pytest.mark.parametrize("recipe", ["fast", "balanced", "awq"])
@pytest.mark.parametrize("edge", EDGES)
def test_a_channel_scale_is_finite_and_the_linear_under_it_too(edge: str, recipe: str) -> None:
    case, chosen = _edge(edge), RECIPES[recipe]
    plan = _plan(chosen, 4, 16, False)
    statistics, readers = _statistics(case.inputs), Readers((case.weight,), (torch.ones(ROWS),))
    evidence = original_evidence(statistics, readers, _choices(chosen, plan))
    choices = ScaleChoices(
        chosen.channel_scale, chosen.scale_families, chosen.importance, chosen.alpha_search, chosen.smooth_alpha
    )
    tied = Tied(torch.arange(COLUMNS), COLUMNS)
    found = begin_channel_scale(readers, statistics, evidence, tied, plan, choices)()
    assert bool(found.per_channel.isfinite().all())
    assert bool((found.per_channel > 0).all())
    scaled = ScaledWeight(case.weight, case.weight, found.per_channel, torch.ones(ROWS))
    _check(begin_linear(scaled, evidence, plan)(), scaled, evidence)


@pytest.mark.parametrize("propagation", [0.5, 1.0, "auto"])
@pytest.mark.parametrize("edge", EDGES)
def test_a_corrected_target_is_finite_and_the_linear_too(edge: str, propagation: float | str) -> None:
    case, recipe = _edge(edge), replace(RECIPES["balanced"], propagation=propagation)
    plan = _plan(recipe, 3, 16, False)
    drifted = case.inputs * 1.05 + 0.1 * case.inputs.roll(1, dims=1)
    paired = finished_paired(accumulate_paired_(empty_paired(COLUMNS), case.inputs, drifted))
    readers = Readers((case.weight,), (torch.ones(ROWS),))
    evidence = propagated_evidence(deepcopy(paired), paired, readers, _choices(recipe, plan))
    target = evidence.target(case.weight)
    assert bool(target.isfinite().all())
    scaled = replace(ScaledWeight.unscaled(case.weight), target=target)
    _check(begin_linear(scaled, evidence, plan)(), scaled, evidence)


@pytest.mark.parametrize("edge", EDGES)
def test_sensitive_rows_are_finite_and_not_worse_by_their_own_objective(edge: str) -> None:
    case, recipe = _edge(edge), RECIPES["best"]
    plan = _plan(recipe, 3, 16, False)
    gradients = correlated(1, ROWS, tokens=50, seed=3).inputs
    gradients[:, 4] = 0.0
    sensitivity = gradients.t() @ gradients / 50
    readers = Readers((case.weight,), (sensitivity,))
    evidence = original_evidence(_statistics(case.inputs), readers, _choices(recipe, plan))
    scaled = ScaledWeight.unscaled(case.weight)
    found = begin_linear(scaled, evidence, plan, sensitivity, sensitive_rounder(sensitivity))()
    assert bool(found.restored.isfinite().all())
    nearest = round_plainly(case.weight, plan)
    errors = [
        two_sided_objective(each - case.weight, evidence.moment, sensitivity)
        for each in (dequantize(nearest.codes, nearest.grid), found.restored)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-4) + 1e-9 * two_sided_objective(case.weight, evidence.moment, sensitivity)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fewer_columns_than_a_usual_group_are_one_group(recipe: str) -> None:
    case = correlated(ROWS, 8)
    plan = replace(_plan(RECIPES[recipe], 4, 8, False), shape=(ROWS, 8))
    readers = Readers((case.weight,), (torch.ones(ROWS),))
    evidence = original_evidence(_statistics(case.inputs), readers, _choices(RECIPES[recipe], plan))
    scaled = ScaledWeight.unscaled(case.weight)
    found = begin_linear(scaled, evidence, plan)()
    assert found.quantized.grid.group_scale.shape == (ROWS, 1)
    _check(found, scaled, evidence)
