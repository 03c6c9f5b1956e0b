"""The channel scale of a fold: what the search finds, and what it says about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awqkit.methods.evidence import Evidence, Readers, original_evidence
from awqkit.methods.fold import ChannelScale, ScaleChoices, Tied, begin_channel_scale, consumer_scale
from awqkit.methods.linear import ScaledWeight, begin_linear, plain_weight, round_plainly
from awqkit.methods.plan import LinearPlan
from awqkit.numerics.grid import dequantize
from awqkit.numerics.statistics import Statistics, accumulate_, empty_statistics, finished, second_moment

GROUP, CHANNELS, OUTLIER = 8, 32, 5
PLAN = LinearPlan("m", (20, CHANNELS), 4, GROUP, False, torch.bfloat16, "none", "nearest")
FAST = ScaleChoices("search", ("importance", "duo"), "square", "group", None)
UNTIED = Tied(torch.arange(CHANNELS), CHANNELS)


def _statistics(x: Tensor) -> Statistics:
    return finished(accumulate_(empty_statistics(x.shape[1]), x))


def _weights(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, CHANNELS, generator=generator) for rows in (12, 8)]


def _inputs(seed: int = 0) -> Tensor:
    x = torch.randn(200, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[:, OUTLIER] *= 30.0
    return x


def _ones(weights: list[Tensor]) -> list[Tensor]:
    return [torch.ones(len(weight)) for weight in weights]


def _search(
    weights: list[Tensor],
    statistics: Statistics,
    choices: ScaleChoices = FAST,
    *,
    row_weights: list[Tensor] | None = None,
    tied: Tied = UNTIED,
) -> ChannelScale:
    readers = Readers(tuple(weights), tuple(row_weights or _ones(weights)))
    evidence = original_evidence(statistics, readers, None)
    return begin_channel_scale(readers, statistics, evidence, tied, PLAN, choices)()


def _error_under(weights: list[Tensor], s: Tensor, moment: Tensor) -> float:
    total = 0.0
    for weight in weights:
        rounded = round_plainly(weight * s, PLAN)
        error = (dequantize(rounded.codes, rounded.grid) / s - weight).double()
        total += float(torch.trace(error @ moment.double() @ error.t()))
    return total


@pytest.mark.parametrize("search", ["group", "layer"])
@pytest.mark.parametrize("families", [("importance",), ("duo",), ("importance", "duo")])
@pytest.mark.parametrize("importance", ["square", "mean-abs"])
def test_a_planted_outlier_channel_is_found_and_its_error_falls(
    search: str, families: tuple[str, ...], importance: str
) -> None:
    weights, statistics = _weights(), _statistics(_inputs())
    found = _search(weights, statistics, ScaleChoices("search", families, importance, search, None))
    assert int(found.per_channel.argmax()) == OUTLIER
    assert float(found.per_channel[OUTLIER]) > 1.5
    moment = second_moment(statistics)
    ones = torch.ones(CHANNELS)
    assert _error_under(weights, found.per_channel, moment) < 0.5 * _error_under(weights, ones, moment)


def test_a_group_search_is_better_than_one_alpha_on_the_groups_own_blocks() -> None:
    weights, statistics = _weights(), _statistics(_inputs())
    moment = second_moment(statistics)
    blocks = torch.block_diag(*(moment[i : i + GROUP, i : i + GROUP] for i in range(0, CHANNELS, GROUP)))
    per_group = _search(weights, statistics)
    per_layer = _search(weights, statistics, replace(FAST, alpha_search="layer"))
    assert per_group.alpha.num_units == CHANNELS // GROUP
    assert per_layer.alpha.num_units == 1
    assert _error_under(weights, per_group.per_channel, blocks) < _error_under(weights, per_layer.per_channel, blocks)


def test_a_layer_search_judges_on_the_full_moment() -> None:
    # Groups that all see the same input: only the full moment knows that their errors add up.
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 1, generator=generator) + 0.05 * torch.randn(300, CHANNELS, generator=generator)
    x = x * torch.exp(0.5 * torch.randn(CHANNELS, generator=generator))
    weights, statistics = _weights(1), _statistics(x)
    per_layer = _search(weights, statistics, ScaleChoices("search", ("importance",), "square", "layer", None))
    moment = second_moment(statistics)
    importance = moment.diagonal()
    errors = {}
    for step in range(21):
        s = importance ** (step / 40)
        errors[step / 20] = _error_under(weights, s / (s.max() * s.min()).sqrt(), moment)
    best = min(errors, key=errors.__getitem__)
    assert per_layer.alpha.alpha_median == (best if best > 0 else None)


def test_mean_abs_and_square_weigh_rare_spikes_differently() -> None:
    x = torch.ones(400, CHANNELS) * torch.where(torch.arange(400) % 2 == 0, 1.0, -1.0)[:, None]
    x = x + 0.3 * torch.randn(400, CHANNELS, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.0
    x[::40, 1] = 40.0  # as large on average as a channel of ±1, but 40 times its energy
    weights, statistics = _weights(), _statistics(x)
    found = {
        kind: _search(weights, statistics, ScaleChoices("search", ("importance",), kind, "group", None)).per_channel[
            :GROUP
        ]
        for kind in ("square", "mean-abs")
    }
    assert float(found["square"][1]) > 1.5 * float(found["square"][0])
    assert float(found["mean-abs"][1]) < 1.2 * float(found["mean-abs"][0])


def test_channels_without_a_producer_keep_s_at_one_and_tied_ones_share_it() -> None:
    channel_of = torch.arange(CHANNELS) // 2
    channel_of[OUTLIER * 2 % CHANNELS + 3] = -1
    found = _search(_weights(), _statistics(_inputs()), tied=Tied(channel_of, 20))
    assert found.per_channel.shape == (20,)
    assert torch.equal(found.per_channel[16:], torch.ones(4))  # nobody reads these
    on_inputs = consumer_scale(found.per_channel, channel_of)
    assert on_inputs.shape == (CHANNELS,)
    assert bool((on_inputs[channel_of < 0] == 1).all())
    assert torch.equal(on_inputs[0], on_inputs[1])
    assert len(on_inputs.unique()) > 8


def test_rows_that_nothing_depends_on_do_not_take_part() -> None:
    statistics = _statistics(_inputs())
    weights = [*_weights(), 50.0 * torch.randn(30, CHANNELS, generator=torch.Generator().manual_seed(9))]
    choices = ScaleChoices("search", ("importance",), "square", "group", None)
    silent = _search(weights, statistics, choices, row_weights=[*_ones(weights[:2]), torch.zeros(30)])
    loud = _search(weights, statistics, choices)
    without = _search(weights[:2], statistics, choices)
    assert torch.equal(silent.per_channel, without.per_channel)
    assert not torch.equal(loud.per_channel, without.per_channel)


def test_the_summary_says_how_the_search_ended() -> None:
    found = _search(_weights(), _statistics(_inputs()))
    alpha = found.alpha
    assert alpha.num_units == 4
    assert alpha.num_identity + sum(alpha.families.values()) == 4
    assert set(alpha.families) <= {"importance", "duo"}
    assert 0.0 <= alpha.alpha_min <= alpha.alpha_median <= alpha.alpha_max <= 1.0
    assert alpha.scale_min == float(found.per_channel.min())
    assert alpha.scale_max == float(found.per_channel.max())


def test_where_nothing_helps_the_identity_stays() -> None:
    # Weights that already lie on their grid: plain rounding has no error at all.
    codes = torch.randint(0, 16, (12, CHANNELS), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0.0, 15.0
    found = _search([(codes - 8.0) * 0.25], _statistics(_inputs()))
    assert found.alpha.num_identity == found.alpha.num_units == 4
    assert found.alpha.families == {}
    assert found.alpha.alpha_median is None
    assert torch.equal(found.per_channel, torch.ones(CHANNELS))


def test_dead_input_channels_do_not_break_the_search() -> None:
    x = _inputs()
    x[:, 3] = 0.0
    x[:, 8:16] = 0.0
    weights = _weights()
    weights[0][:, 17] = weights[1][:, 17] = 0.0
    for choices in (FAST, replace(FAST, alpha_search="layer"), replace(FAST, importance="mean-abs")):
        found = _search(weights, _statistics(x), choices)
        assert bool(torch.isfinite(found.per_channel).all())
        assert bool((found.per_channel > 0).all())


def test_row_errors_are_weighted_and_in_the_originals_units() -> None:
    weights, statistics = _weights(), _statistics(_inputs())
    moment = second_moment(statistics)
    s = _search(weights, statistics).per_channel
    row_scale = [torch.exp(torch.randn(len(weight))) for weight in weights]
    row_weights = [torch.rand(len(weight)) for weight in weights]
    scaled = [ScaledWeight(weight, weight, s, rows) for weight, rows in zip(weights, row_scale, strict=True)]
    for weight, entry, rows in zip(weights, scaled, row_weights, strict=True):
        linear = begin_linear(entry, Evidence(moment, None), replace(PLAN, clip="ends"), fold_weight=rows)()
        expected = [
            float(((error @ moment.double()) * error).sum(dim=1) @ rows.double())
            for error in ((each - weight).double() for each in (plain_weight(entry, PLAN), linear.restored))
        ]
        torch.testing.assert_close(linear.row_errors, tuple(expected), rtol=1e-3, atol=0)
        assert expected[1] < expected[0]
