"""One linear: its codes, its Decision and the check that clip did no harm, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awqkit.methods.evidence import Evidence
from awqkit.methods.linear import ScaledWeight, begin_linear, plain_weight, round_plainly
from awqkit.methods.plan import LinearPlan
from awqkit.numerics.grid import dequantize

GROUP = 8


def _plan(rows: int, columns: int, **choices: object) -> LinearPlan:
    base = LinearPlan("m.linear", (rows, columns), 4, GROUP, False, torch.bfloat16, "ends", "nearest")
    return replace(base, **choices)


def _case(rows: int = 12, columns: int = 24, seed: int = 0) -> tuple[ScaledWeight, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(100, columns, generator=generator) * torch.exp(torch.randn(columns, generator=generator))
    scale = torch.exp(torch.randn(columns, generator=generator))
    row_scale = torch.exp(torch.randn(rows, generator=generator))
    return ScaledWeight(weight, weight, scale, row_scale), x.t() @ x / 100


def _error(candidate: Tensor, original: Tensor, moment: Tensor) -> float:
    error = candidate.double() - original.double()
    return float(torch.trace(error @ moment.double() @ error.t()))


def test_restoring_undoes_both_scales() -> None:
    scaled, _ = _case()
    expected = scaled.original * scaled.channel_scale / scaled.row_scale[:, None]
    torch.testing.assert_close(scaled.weight, expected)
    assert not torch.allclose(scaled.weight, scaled.original)
    torch.testing.assert_close(scaled.restored(scaled.weight), scaled.original, rtol=1e-5, atol=1e-6)
    unscaled = ScaledWeight.unscaled(scaled.original)
    assert torch.equal(unscaled.weight, scaled.original)


@pytest.mark.parametrize("clip", ["none", "shared", "ends"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_decision_holds_the_errors_of_the_codes(clip: str, symmetric: bool) -> None:
    scaled, moment = _case()
    plan = _plan(12, 24, clip=clip, symmetric=symmetric)
    found = begin_linear(scaled, Evidence(moment, None), plan)()
    weight = scaled.original
    means = dequantize(found.quantized.codes, found.quantized.grid)
    torch.testing.assert_close(found.restored, means / scaled.channel_scale * scaled.row_scale[:, None])
    plain = round_plainly(weight, plan)
    plain = dequantize(plain.codes, plain.grid)
    energy, size = _error(0 * weight, weight, moment), float(weight.double().square().sum())
    decision = found.decision
    assert (decision.name, decision.shape) == ("m.linear", (12, 24))
    assert (decision.bits, decision.group_size) == (4, GROUP)
    expected = {
        "output_error_nearest": _error(plain, weight, moment) / energy,
        "output_error": _error(found.restored, weight, moment) / energy,
        "weight_error_nearest": float((plain - weight).double().square().sum()) / size,
        "weight_error": float((found.restored - weight).double().square().sum()) / size,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(decision, name), value, rtol=1e-3, atol=0)
    assert (decision.clip_mean < 1.0) == (clip != "none" and decision.fallback is None)


def test_clip_lowers_the_error_that_it_is_judged_on() -> None:
    scaled, moment = _case()
    moment = torch.block_diag(*(moment[i : i + GROUP, i : i + GROUP] for i in range(0, 24, GROUP)))
    errors = [
        begin_linear(scaled, Evidence(moment, None), _plan(12, 24, clip=c))().decision.output_error
        for c in ("none", "shared", "ends")
    ]
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] < 0.99 * errors[1]


def test_clip_is_searched_for_the_input_that_the_scaled_weight_reads() -> None:
    scaled, moment = _case()
    s = scaled.channel_scale
    found = begin_linear(scaled, Evidence(moment, None), _plan(12, 24))()
    expected = begin_linear(
        ScaledWeight.unscaled(scaled.weight), Evidence(moment / s / s[:, None], None), _plan(12, 24)
    )()
    assert found.decision.fallback is None
    assert torch.equal(found.quantized.codes, expected.quantized.codes)
    other = begin_linear(ScaledWeight.unscaled(scaled.weight), Evidence(moment, None), _plan(12, 24))()
    assert not torch.equal(found.quantized.codes, other.quantized.codes)


def _correlated(seed: int) -> tuple[ScaledWeight, Tensor]:
    """One row whose groups all see nearly the same input: what is best for a group alone may hurt the sum."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 2 * GROUP, generator=generator)
    return ScaledWeight.unscaled(weight), torch.full((2 * GROUP, 2 * GROUP), 0.98) + 0.02 * torch.eye(2 * GROUP)


def test_no_linear_is_worse_than_nearest_rounding_and_a_fallback_says_why() -> None:
    plan, undone, kept = _plan(1, 2 * GROUP), 0, 0
    for seed in range(40):
        scaled, moment = _correlated(seed)
        found = begin_linear(scaled, Evidence(moment, None), plan)()
        nearest = round_plainly(scaled.weight, plan)
        errors = [
            _error(dequantize(entry.codes, entry.grid), scaled.weight, moment) for entry in (found.quantized, nearest)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-4)
        if found.decision.fallback is None:
            kept += 1
            continue
        undone += 1
        assert "nearest rounding kept" in found.decision.fallback
        assert torch.equal(found.quantized.codes, nearest.codes)
        assert torch.equal(found.quantized.grid.group_scale, nearest.grid.group_scale)
        assert found.decision.clip_mean == 1.0
        assert found.decision.output_error == found.decision.output_error_nearest
    assert undone >= 3
    assert kept >= 3


def test_without_calibration_it_is_nearest_rounding_and_output_errors_are_unknown() -> None:
    scaled, _ = _case()
    found = begin_linear(scaled, None, _plan(12, 24))()
    nearest = round_plainly(scaled.weight, _plan(12, 24))
    assert torch.equal(found.quantized.codes, nearest.codes)
    assert found.decision.output_error is None
    assert found.decision.output_error_nearest is None
    assert found.decision.weight_error > 0


def test_plain_weight_ignores_s_and_keeps_the_row_scale() -> None:
    scaled, _ = _case()
    plan = _plan(12, 24)
    rows_only = scaled.original / scaled.row_scale[:, None]
    rounded = round_plainly(rows_only, plan)
    expected = dequantize(rounded.codes, rounded.grid) * scaled.row_scale[:, None]
    torch.testing.assert_close(plain_weight(scaled, plan), expected)


def test_the_weight_given_is_not_written_to() -> None:
    scaled, moment = _case()
    saved = scaled.original.clone(), moment.clone()
    begin_linear(scaled, Evidence(moment, None), _plan(12, 24))()
    assert torch.equal(scaled.original, saved[0])
    assert torch.equal(moment, saved[1])
