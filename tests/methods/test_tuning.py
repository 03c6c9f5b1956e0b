"""Scales and gains that a gradient can move: exact at rest, stored exactly afterwards."""

from __future__ import annotations

import pytest
import torch

from awqkit.methods.tuning import TunableGain, TunableLinear
from awqkit.numerics.grid import QuantizedWeight, dequantize
from awqkit.numerics.rounding import round_nearest, span_grid

TUNINGS = ("groups", "rows")


def _quantized(seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    grid = span_grid(weight, bits=3, group_size=16, symmetric=False, stored_dtype=torch.bfloat16)
    return round_nearest(weight, grid)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_at_rest_a_tunable_linear_is_the_quantized_one(tuning: str) -> None:
    quantized = _quantized()
    linear = TunableLinear(quantized, tuning)
    torch.testing.assert_close(linear.weight().detach(), dequantize(quantized.codes, quantized.grid), rtol=0, atol=0)
    finished = linear.finished(torch.bfloat16)
    assert torch.equal(finished.grid.group_scale, quantized.grid.group_scale)
    assert torch.equal(finished.codes, quantized.codes)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_moved_scale_is_stored_as_its_dtype_holds_it(tuning: str) -> None:
    linear = TunableLinear(_quantized(), tuning)
    linear.log_change.data += 0.1
    scale = linear.finished(torch.bfloat16).grid.group_scale
    assert torch.equal(scale, scale.to(torch.bfloat16).float())
    torch.testing.assert_close(scale, _quantized().grid.group_scale * torch.tensor(0.1).exp(), rtol=1 / 256, atol=0)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_gradient_of_a_scale_is_that_of_a_factor(tuning: str) -> None:
    """Of what the linear computes, bias and all, by differences of its stored form in float64."""
    quantized, generator = _quantized(), torch.Generator().manual_seed(1)
    linear, bias = TunableLinear(quantized, tuning), torch.randn(6, generator=generator)
    inputs, step = torch.randn(5, 32, generator=generator), 1e-3
    outputs = inputs @ linear.weight().t() + bias
    (linear.scaled(outputs, bias) if linear.per_row else outputs).square().sum().backward()
    for row, group in ((0, 0), (3, 1)):
        group = 0 if linear.per_row else group
        moved = []
        for sign in (1, -1):
            other = TunableLinear(quantized, tuning)
            other.log_change.data[row, group] = sign * step
            weight = dequantize(quantized.codes, other.finished(torch.float32).grid).double()
            moved.append((inputs.double() @ weight.t() + bias.double()).square().sum())
        expected = float(moved[0] - moved[1]) / (2 * step)
        assert abs(float(linear.log_change.grad[row, group]) - expected) <= 1e-2 * abs(expected) + 1e-3


def test_gains_move_by_a_factor_of_what_multiplies() -> None:
    value = torch.tensor([0.5, -0.25, 0.0])
    plain, offset = TunableGain.of(value, is_offset=False), TunableGain.of(value, is_offset=True)
    for gain in (plain, offset):
        torch.testing.assert_close(gain.vector().detach(), value)
        gain.log_change.data += torch.tensor(2.0).log()
    torch.testing.assert_close(plain.vector().detach(), 2 * value)
    torch.testing.assert_close(1 + offset.vector().detach(), 2 * (1 + value))
