"""The identity that AWQ and SmoothQuant share, and SmoothQuant's own scale."""

from __future__ import annotations

import pytest
import torch
from numerics.cases import correlated
from torch import Tensor

from awqkit.methods.evidence import Evidence, Readers
from awqkit.methods.fold import ChannelScale, ScaleChoices, Tied, begin_channel_scale, smoothing_errors
from awqkit.methods.linear import ScaledWeight, begin_linear, round_plainly
from awqkit.methods.plan import LinearPlan
from awqkit.numerics.activations import round_tokens
from awqkit.numerics.channel_scale import ALPHAS, smooth_candidates
from awqkit.numerics.grid import dequantize
from awqkit.numerics.statistics import Statistics, accumulate_, empty_statistics, finished

CHANNELS, OUTLIER = 32, 11
W8 = LinearPlan("m", (12, CHANNELS), 8, CHANNELS, True, torch.bfloat16, "none", "nearest")
W4 = LinearPlan("m", (12, CHANNELS), 4, 8, False, torch.bfloat16, "none", "nearest")
SMOOTH = ScaleChoices("smooth", ("importance",), "square", "group", None)
AWQ = ScaleChoices("search", ("importance", "duo"), "mean-abs", "group", None)


def _case() -> tuple[Tensor, Tensor]:
    """Weight `[out, in]` and inputs `[tokens, in]` with one channel far above the others."""
    case = correlated(12, CHANNELS)
    case.inputs[:, OUTLIER] *= 60.0
    return case.weight, case.inputs


def _search(
    weight: Tensor, x: Tensor, choices: ScaleChoices, plan: LinearPlan, channel_of: Tensor | None = None
) -> ChannelScale:
    statistics = _statistics(x)
    channel_of = torch.arange(CHANNELS) if channel_of is None else channel_of
    tied = Tied(channel_of, int(channel_of.max()) + 1)
    readers = Readers((weight,), (torch.ones(len(weight)),))
    return begin_channel_scale(readers, statistics, Evidence(x.t() @ x / len(x), None), tied, plan, choices)()


def _statistics(x: Tensor) -> Statistics:
    return finished(accumulate_(empty_statistics(CHANNELS), x))


@pytest.mark.parametrize(("choices", "plan"), [(AWQ, W4), (SMOOTH, W8)], ids=["awq", "smoothquant"])
def test_a_scaled_weight_on_a_divided_input_is_the_same_linear(choices: ScaleChoices, plan: LinearPlan) -> None:
    """Y = X Wᵀ = (X S⁻¹)(S Wᵀ): whatever s, only rounding makes a difference."""
    weight, x = _case()
    s = _search(weight, x, choices, plan).per_channel
    assert len(s.unique()) > 4
    scaled = ScaledWeight(weight, weight, s, torch.ones(12))
    expected = x.double() @ weight.double().t()
    found = (x / s).double() @ scaled.weight.double().t()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    power = torch.exp2(torch.log2(s).round())  # exact in floating point
    exact = ScaledWeight(weight, weight, power, torch.ones(12))
    assert torch.equal((x / power).double() @ exact.weight.double().t(), expected)
    assert torch.equal(exact.restored(exact.weight), weight)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_a_given_alpha_is_the_formula_of_the_paper(alpha: float) -> None:
    weight, x = _case()
    found = _search(weight, x, ScaleChoices("smooth", (), "square", "group", alpha), W8)
    raw = x.double().abs().amax(dim=0) ** alpha / weight.double().abs().amax(dim=0) ** (1 - alpha)
    torch.testing.assert_close(found.per_channel.double(), raw / (raw.max() * raw.min()).sqrt(), rtol=1e-4, atol=0)
    assert found.alpha.alpha_median == alpha
    assert found.alpha.families == {"smooth": 1}


def test_without_one_21_alphas_and_the_identity_are_tried() -> None:
    weight, x = _case()
    tried = smooth_candidates(x.abs().amax(dim=0), weight.abs().amax(dim=0), torch.arange(CHANNELS), None)
    assert [candidate.family for candidate in tried] == ["identity", *["smooth"] * 21]
    assert tuple(candidate.alpha for candidate in tried[1:]) == ALPHAS


def _w8a8_error(weight: Tensor, x: Tensor, s: Tensor) -> float:
    """Mean squared error of the output with both sides really rounded, relative to the output."""
    quantized = begin_linear(ScaledWeight(weight, weight, s, torch.ones(12)), None, W8)()
    inputs = round_tokens(x / s) * s
    expected = x.double() @ weight.double().t()
    found = inputs.double() @ quantized.restored.double().t()
    return float((found - expected).square().sum() / expected.square().sum())


def test_the_searched_alpha_is_the_best_for_weight_and_input_together() -> None:
    weight, x = _case()
    weight = weight * torch.exp(torch.randn(CHANNELS, generator=torch.Generator().manual_seed(5)))
    moment, ones = (x.t() @ x / len(x)).double(), torch.ones(CHANNELS)
    costs, of_weight = {}, {}
    for alpha in ALPHAS:
        s = _search(weight, x, ScaleChoices("smooth", (), "square", "group", alpha), W8).per_channel
        rounded = round_plainly(weight * s, W8)
        error = (dequantize(rounded.codes, rounded.grid) / s - weight).double()
        of_weight[alpha] = float(torch.trace(error @ moment @ error.t()))
        sample = accumulate_(empty_statistics(CHANNELS), x).sample
        costs[alpha] = of_weight[alpha] + _token_cost(weight, sample, s, torch.ones(12))
    best = min(costs, key=costs.__getitem__)
    assert _search(weight, x, SMOOTH, W8).alpha.alpha_median == best
    assert best != min(of_weight, key=of_weight.__getitem__)
    assert torch.equal(ones, _search(weight * 0, x, SMOOTH, W8).per_channel)  # nothing to gain: the identity


def test_the_searched_alpha_lowers_the_error_of_both_sides_together() -> None:
    weight, x = _case()
    weight[:, OUTLIER] *= 0.02  # else the outlier is all of the output
    found = _search(weight, x, SMOOTH, W8)
    ones = torch.ones(CHANNELS)
    assert int(found.per_channel.argmax()) == OUTLIER
    assert _w8a8_error(weight, x, found.per_channel) < 0.2 * _w8a8_error(weight, x, ones)
    by_alpha = [
        _w8a8_error(weight, x, _search(weight, x, ScaleChoices("smooth", (), "square", "group", alpha), W8).per_channel)
        for alpha in ALPHAS
    ]
    assert _w8a8_error(weight, x, found.per_channel) < 1.1 * min(by_alpha)
    assert max(by_alpha) > 3 * min(by_alpha)


def test_tied_channels_share_the_largest_of_their_values_and_free_ones_stay() -> None:
    weight, x = _case()
    channel_of = torch.arange(CHANNELS) // 2
    channel_of[-2:] = -1
    found = _search(weight, x, ScaleChoices("smooth", (), "square", "group", 0.5), W8, channel_of)
    assert found.per_channel.shape == (15,)
    top_x, top_w = (value.double().abs().amax(dim=0).reshape(16, 2).amax(dim=1)[:15] for value in (x, weight))
    raw = (top_x / top_w).sqrt()
    torch.testing.assert_close(found.per_channel.double(), raw / (raw.max() * raw.min()).sqrt(), rtol=1e-4, atol=0)


def test_smoothing_errors_say_what_rounding_the_input_adds() -> None:
    weight, x = _case()
    s = _search(weight, x, SMOOTH, W8).per_channel
    rows = torch.rand(12, generator=torch.Generator().manual_seed(1))
    scaled = ScaledWeight(weight, weight, s, torch.ones(12))
    plain, chosen = smoothing_errors([scaled, scaled], [rows, rows], [x, x])
    expected = [2 * _token_cost(weight, x, scale, rows) for scale in (torch.ones(CHANNELS), s)]
    torch.testing.assert_close([plain, chosen], expected, rtol=1e-3, atol=0)


def _token_cost(weight: Tensor, x: Tensor, scale: Tensor, rows: Tensor) -> float:
    """Σ_i r_i E‖W_i (x − x̂)‖² of rounding x / s per token, by its definition."""
    divided = x.double() / scale.double()
    step = divided.abs().amax(dim=1, keepdim=True) / 127
    lost = (divided - (divided / step).round() * step) * scale.double()
    return float(((lost @ weight.double().t()).square() @ rows.double()).mean())


def test_dead_channels_give_finite_scales() -> None:
    weight, x = _case()
    x[:, 3] = 0.0
    weight[:, 4] = 0.0
    for choices in (SMOOTH, ScaleChoices("smooth", (), "square", "group", 0.5)):
        found = _search(weight, x, choices, W8).per_channel
        assert bool(found.isfinite().all())
        assert bool((found > 0).all())
