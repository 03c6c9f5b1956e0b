"""Two-sided rounding: later rows absorb what earlier rows did, against explicit inverses in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numerics.cases import correlated
from numerics.reference import fed_back_rows, two_sided_objective
from torch import Tensor

from awqkit.methods import rows
from awqkit.methods.evidence import Evidence
from awqkit.methods.linear import ScaledWeight, begin_linear, round_rows_alike
from awqkit.methods.plan import LinearPlan
from awqkit.methods.rows import DAMP_RATIO, sensitive_rounder
from awqkit.numerics.grid import dequantize
from awqkit.numerics.rounding_metric import energy_order, moment_order, rounding_metric

OUT, IN, GROUP = 20, 48, 16
PLAN = LinearPlan(
    "m", (OUT, IN), 3, GROUP, False, torch.bfloat16, "ends", "gptq", "conditional", ("descent", "refit"), 1
)


def _case(seed: int = 0, out: int = OUT, *, scaled: bool = False) -> tuple[ScaledWeight, Evidence, Tensor]:
    case = correlated(out, IN, seed=seed)
    gradients = correlated(1, out, seed=100 + seed, spread=0.4).inputs
    metric = rounding_metric(case.moment, energy_order(case.moment, case.energy), 0.05)
    weight = ScaledWeight.unscaled(case.weight)
    if scaled:
        generator = torch.Generator().manual_seed(7)
        scale, row_scale = (torch.exp(0.5 * torch.randn(size, generator=generator)) for size in (IN, out))
        weight = replace(weight, channel_scale=scale, row_scale=row_scale)
    return weight, Evidence(case.moment, metric), gradients.t() @ gradients / len(gradients)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("at_once", [1, 6, 20])
def test_every_block_of_rows_aims_at_what_is_best_given_the_blocks_before_it(
    at_once: int, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(rows, "MOST_BLOCKS", 1000)
    weight, evidence, sensitivity = _case(scaled=scaled)
    found = sensitive_rounder(sensitivity)(weight, evidence, PLAN).quantized
    restored = weight.restored(dequantize(found.codes, found.grid))
    order = moment_order(sensitivity)
    damped = rounding_metric(sensitivity, order, DAMP_RATIO).damped
    error = restored.double() - weight.target.double()
    same = 0
    for start in range(0, OUT, at_once):
        done, free = order[:start], order[start:]
        block = order[start : start + at_once]
        target = fed_back_rows(weight.target, error, damped, done, free)[: len(block)].float()
        part = weight.of_rows(target, block)
        expected = round_rows_alike(part, evidence, PLAN).quantized
        same += int((found.codes[block] == expected.codes).sum())
        torch.testing.assert_close(
            found.grid.group_scale[block], expected.grid.group_scale, rtol=0.03, atol=0.0
        )  # a few steps of bfloat16, where the two targets lie on both sides of a border
    assert same > 0.98 * OUT * IN
    assert at_once == OUT or float((round_rows_alike(weight, evidence, PLAN).quantized.codes != found.codes).sum()) > 20


def test_rows_come_back_in_their_own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 6)
    monkeypatch.setattr(rows, "MOST_BLOCKS", 1000)
    weight, evidence, _ = _case()
    independent = torch.diag(torch.linspace(0.1, 3.0, OUT)[torch.randperm(OUT)])
    found = sensitive_rounder(independent)(weight, evidence, PLAN)
    alike = round_rows_alike(weight, evidence, PLAN)
    assert torch.equal(found.quantized.codes, alike.quantized.codes)
    assert torch.equal(found.quantized.grid.group_scale, alike.quantized.grid.group_scale)
    assert torch.equal(found.quantized.grid.group_zero, alike.quantized.grid.group_zero)
    assert found.quantized.codes.shape == (OUT, IN)
    torch.testing.assert_close(found.kept_range, alike.kept_range)


@pytest.mark.parametrize("seed", range(3))
def test_it_lowers_the_objective_in_which_rows_meet(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 8)
    monkeypatch.setattr(rows, "MOST_BLOCKS", 1000)
    weight, evidence, sensitivity = _case(seed, out=64)
    plan = replace(PLAN, shape=(64, IN))
    alike = begin_linear(weight, evidence, plan, sensitivity)()
    sensitive = begin_linear(weight, evidence, plan, sensitivity, sensitive_rounder(sensitivity))()
    errors = [
        two_sided_objective(linear.restored - weight.target, evidence.moment, sensitivity)
        for linear in (alike, sensitive)
    ]
    assert errors[1] < 0.95 * errors[0]
    assert sensitive.decision.fallback is None


def test_what_is_not_better_than_nearest_rounding_by_that_objective_is_undone() -> None:
    weight, evidence, sensitivity = _case()

    def absurd(*arguments: object) -> object:
        rounded = round_rows_alike(weight, evidence, PLAN)
        grid = replace(rounded.quantized.grid, group_scale=rounded.quantized.grid.group_scale * 3)
        return replace(rounded, quantized=replace(rounded.quantized, grid=grid))

    found = begin_linear(weight, evidence, PLAN, sensitivity, absurd)()
    assert "nearest rounding kept" in found.decision.fallback
    assert torch.equal(found.quantized.codes, begin_linear(weight, None, PLAN)().quantized.codes)


@pytest.mark.parametrize("kind", ["zero", "rank one", "dead rows"])
def test_a_deficient_sensitivity_gives_finite_codes(kind: str) -> None:
    weight, evidence, sensitivity = _case()
    if kind == "zero":
        sensitivity = torch.zeros_like(sensitivity)
    elif kind == "rank one":
        sensitivity = sensitivity[:1].t() @ sensitivity[:1]
    else:
        sensitivity[3:8], sensitivity[:, 3:8] = 0.0, 0.0
    found = begin_linear(weight, evidence, PLAN, sensitivity, sensitive_rounder(sensitivity))()
    assert bool(found.restored.isfinite().all())
