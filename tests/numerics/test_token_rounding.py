"""Inputs rounded per token against a loop, and what the search thinks that it costs against what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.numerics.activations import round_tokens, token_rounding_error


def _tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 20.0
    x[0, 4] = 0.0
    return x.to(dtype)


def test_every_token_is_rounded_to_255_steps_of_its_own() -> None:
    x = _tokens()
    found = round_tokens(x)
    for token, rounded in zip(x.reshape(-1, 16).tolist(), found.reshape(-1, 16).tolist(), strict=True):
        step = max(abs(value) for value in token) / 127
        for value, result in zip(token, rounded, strict=True):
            exact = value / step if step else 0.0
            near = {(round(exact + shift)) * step for shift in (-1e-4, 1e-4)}
            assert min(abs(result - candidate) for candidate in near) <= 1e-5 * (abs(result) + step)
    assert not found[0, 4].any()
    assert int((found[0, 0] / (found[0, 0].abs().max() / 127)).round().abs().max()) == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_the_input_is_not_written_to(dtype: torch.dtype) -> None:
    x = _tokens(dtype)
    saved = x.clone()
    assert round_tokens(x).dtype == dtype
    assert torch.equal(x, saved)
    assert not torch.equal(round_tokens(x), saved)


def _cost(x: Tensor, weight: Tensor, s: Tensor, rows: Tensor) -> float:
    """Σ_i r_i E‖W_i s (x/s − rounded(x/s))‖² in float64."""
    divided = x / s
    error = (divided - round_tokens(divided)).double() @ (weight * s).double().t()
    return float((error.square() * rows.double()).sum(dim=-1).mean())


def test_the_cost_is_what_rounding_the_tokens_costs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 16, generator=generator)
    weight, rows = torch.randn(6, 16, generator=generator), torch.rand(6, generator=generator)
    for s in (torch.ones(16), torch.exp(torch.randn(16, generator=generator))):
        expected = _cost(x, weight, s, rows)
        assert abs(token_rounding_error(weight, x, s, rows) - expected) <= 1e-3 * expected


def test_moving_an_outlier_into_the_weight_lowers_the_cost() -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))
    x[:, 7] *= 50.0
    weight, rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(3)), torch.ones(6)
    moved = torch.ones(16)
    moved[7] = 7.0
    costs = [token_rounding_error(weight, x, s, rows) for s in (torch.ones(16), moved)]
    assert costs[1] < 0.3 * costs[0]


def test_a_common_factor_of_all_scales_costs_nothing() -> None:
    x, weight, rows = _tokens().reshape(-1, 16), torch.randn(6, 16), torch.ones(6)
    one, other = (token_rounding_error(weight, x, torch.full((16,), s), rows) for s in (1.0, 32.0))
    assert abs(one - other) <= 1e-5 * one


def test_no_tokens_cost_nothing() -> None:
    assert token_rounding_error(torch.ones(2, 16), torch.empty(0, 16), torch.ones(16), torch.ones(2)) == 0.0
