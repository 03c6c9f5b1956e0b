"""Search units, candidates and their errors against naive loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.numerics.channel_scale import ALPHAS, best_per_unit, candidates, rounding_errors, search_units, tied_mean
from awqkit.numerics.output_error import diagonal_blocks

GROUP = 4
BOTH = ("importance", "duo")


def _grouped_query(kv_heads: int, repeats: int, head_dim: int) -> Tensor:
    """`channel_of` of v → o: input channels in order of query heads, each kv head read by `repeats` of them."""
    heads = torch.arange(kv_heads).repeat_interleave(repeats)
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def _partition(units: Tensor) -> list[set[int]]:
    return [set((units == unit).nonzero().flatten().tolist()) for unit in range(int(units.max()) + 1)]


def test_without_ties_every_group_is_a_unit() -> None:
    units = search_units(torch.arange(16), 16, GROUP)
    assert units.tolist() == [0, 1, 2, 3]


def test_groups_that_read_one_producer_channel_form_a_unit() -> None:
    # 2 kv heads of 8 channels, each read by 2 query heads: o's input has 32 channels, 8 groups of 4
    units = search_units(_grouped_query(2, 2, 8), 16, GROUP)
    assert _partition(units) == [{0, 2}, {1, 3}, {4, 6}, {5, 7}]


def test_a_group_that_straddles_heads_ties_everything_that_it_touches() -> None:
    # heads of 6 channels in groups of 4: groups 1 and 4 lie across two heads
    channel_of = _grouped_query(2, 2, 6)
    assert len(channel_of) == 24
    units = search_units(channel_of, 12, GROUP)
    # heads 0 and 1 (groups 0, 1, 2) read kv head 0, heads 2 and 3 (groups 3, 4, 5) kv head 1
    assert _partition(units) == [{0, 1, 2}, {3, 4, 5}]


def test_ties_chain_over_many_groups() -> None:
    # group k shares a channel with group k + 1 only: one unit all the same
    channel_of = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12])
    assert search_units(channel_of, 13, GROUP).tolist() == [0, 0, 0, 0]


def test_channels_without_a_producer_tie_nothing() -> None:
    channel_of = torch.tensor([0, 1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 1])
    assert _partition(search_units(channel_of, 4, GROUP)) == [{0, 2}, {1}]


def test_tied_mean_averages_over_the_readers_of_a_channel() -> None:
    channel_of = torch.tensor([0, 1, -1, 0, 1, 2])
    values = torch.tensor([1.0, 10.0, 99.0, 3.0, 30.0, 7.0])
    assert tied_mean(values, channel_of, 3).tolist() == [2.0, 20.0, 1.0, 2.0, 20.0, 7.0]


def _statistics(channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.exp(2 * torch.randn(channels, generator=generator))
    return importance, torch.exp(0.5 * torch.randn(channels, generator=generator))


def test_candidates_are_21_alphas_of_two_families_with_the_identity_first() -> None:
    importance, column_rms = _statistics(8)
    tried = candidates(importance, column_rms, torch.arange(8), torch.zeros(8, dtype=torch.int64), BOTH)
    assert tried[0].family == "identity"
    assert torch.equal(tried[0].channel_scale, torch.ones(8))
    assert len(ALPHAS) == 21
    assert (ALPHAS[0], ALPHAS[-1]) == (0.0, 1.0)
    # α = 0 of the first family is the identity again
    assert [c.alpha for c in tried if c.family == "importance"] == list(ALPHAS[1:])
    assert [c.alpha for c in tried if c.family == "duo"] == list(ALPHAS)


@pytest.mark.parametrize("family", BOTH)
def test_candidates_follow_the_formula_normalised_by_the_root_of_max_times_min(family: str) -> None:
    importance, column_rms = _statistics(8)
    unit_of_channel = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    for candidate in candidates(importance, column_rms, torch.arange(8), unit_of_channel, (family,))[1:]:
        alpha = candidate.alpha
        raw = importance.double() ** (alpha / 2)
        if family == "duo":
            raw = raw / column_rms.double() ** (1 - alpha)
        for part in (slice(0, 4), slice(4, 8)):
            expected = raw[part] / (raw[part].max() * raw[part].min()).sqrt()
            torch.testing.assert_close(candidate.channel_scale[part].double(), expected, rtol=1e-5, atol=0)


def test_candidates_are_constant_over_tied_channels_and_one_without_a_producer() -> None:
    channel_of = torch.tensor([0, 1, 2, -1, 2, 1, 0, -1])
    importance, column_rms = _statistics(8)
    tied = [tied_mean(values, channel_of, 3) for values in (importance, column_rms)]
    for candidate in candidates(*tied, channel_of, torch.zeros(8, dtype=torch.int64), BOTH):
        s = candidate.channel_scale
        assert s[[0, 1, 2]].tolist() == s[[6, 5, 4]].tolist()
        assert s[[3, 7]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dead", ["importance", "column", "both", "all"])
def test_dead_channels_give_finite_scales(dead: str) -> None:
    importance, column_rms = _statistics(8)
    if dead in ("importance", "both"):
        importance[2] = 0.0
    if dead in ("column", "both"):
        column_rms[2] = 0.0
    if dead == "all":
        importance, column_rms = torch.zeros(8), torch.zeros(8)
    units = torch.zeros(8, dtype=torch.int64)
    for candidate in candidates(importance, column_rms, torch.arange(8), units, BOTH):
        assert bool(torch.isfinite(candidate.channel_scale).all())
        assert bool((candidate.channel_scale > 0).all())


def _naive_error(
    weight: Tensor, moment: Tensor, rows: Tensor, s: Tensor, bits: int, symmetric: bool, full: bool
) -> Tensor:
    """Nearest rounding under s, one group of one row at a time, float64 (Δ rounded to bfloat16 as on disk)."""
    error = torch.zeros_like(weight, dtype=torch.float64)
    top = 2**bits - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], GROUP):
            part = slice(start, start + GROUP)
            scaled = (weight[row, part] * s[part]).double()
            low, high = min(float(scaled.min()), 0.0), max(float(scaled.max()), 0.0)
            span = 2 * max(-low, high) if symmetric else high - low
            step = float(torch.tensor(span / top).to(torch.bfloat16))
            zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / step), 0), top)
            codes = ((scaled / step).round() + zero).clamp(0, top)
            error[row, part] = ((codes - zero) * step - scaled) / s[part].double()
    if full:
        return ((error @ moment.double()) * error).sum(dim=1).mul(rows.double()).sum().reshape(1)
    sums = []
    for start in range(0, weight.shape[1], GROUP):
        part = slice(start, start + GROUP)
        block = error[:, part]
        sums.append(((block @ moment[part, part].double()) * block).sum(dim=1).mul(rows.double()).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_errors_equal_a_loop_over_rows_and_groups(bits: int, symmetric: bool, full: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(7, 12, generator=generator)
    x = torch.randn(40, 12, generator=generator) * torch.linspace(0.1, 5.0, 12) + 0.5
    moment, rows = x.t() @ x / 40, torch.rand(7, generator=generator)
    importance, column_rms = moment.diagonal(), weight.square().mean(dim=0).sqrt()
    tried = candidates(importance, column_rms, torch.arange(12), torch.arange(12) // GROUP, BOTH)[::5]
    found = rounding_errors(
        weight,
        diagonal_blocks(moment, GROUP),
        rows,
        tried,
        bits=bits,
        group_size=GROUP,
        symmetric=symmetric,
        stored_dtype=torch.bfloat16,
        full_moment=moment if full else None,
    )
    assert found.shape == (len(tried), 1 if full else 3)
    for errors, candidate in zip(found, tried, strict=True):
        expected = _naive_error(weight, moment, rows, candidate.channel_scale, bits, symmetric, full)
        torch.testing.assert_close(errors.double(), expected, rtol=2e-3, atol=1e-7)


def test_rounding_errors_do_not_depend_on_the_tiles_of_rows() -> None:
    # 3000 rows of 96 channels are more than one tile
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(3000, 96, generator=generator), torch.rand(3000, generator=generator)
    moment = torch.eye(96) * torch.linspace(0.5, 9.0, 96)
    units = torch.arange(96) // 32
    tried = candidates(moment.diagonal(), torch.ones(96), torch.arange(96), units, ("importance",))[::10]
    choices = {"bits": 4, "group_size": 32, "symmetric": False, "stored_dtype": torch.bfloat16}
    blocks = diagonal_blocks(moment, 32)
    at_once = rounding_errors(weight, blocks, rows, tried, **choices)
    parts = [
        rounding_errors(weight[i : i + 500], blocks, rows[i : i + 500], tried, **choices) for i in range(0, 3000, 500)
    ]
    torch.testing.assert_close(at_once, torch.stack(parts).sum(dim=0), rtol=1e-4, atol=0)


def test_inputs_of_the_search_stay_as_they_are() -> None:
    weight, blocks, rows = torch.randn(4, 8), torch.eye(GROUP).repeat(2, 1, 1), torch.ones(4)
    saved = [value.clone() for value in (weight, blocks, rows)]
    tried = candidates(torch.ones(8), torch.ones(8), torch.arange(8), torch.zeros(8, dtype=torch.int64), BOTH)
    rounding_errors(
        weight,
        blocks,
        rows,
        tried,
        bits=4,
        group_size=GROUP,
        symmetric=False,
        stored_dtype=torch.bfloat16,
    )
    assert all(torch.equal(a, b) for a, b in zip(saved, (weight, blocks, rows), strict=True))


def test_the_best_candidate_of_a_unit_is_judged_on_the_sum_of_its_groups() -> None:
    errors = torch.tensor([[5.0, 5.0, 1.0], [1.0, 8.0, 2.0], [4.0, 4.0, 3.0]])
    assert best_per_unit(errors, torch.tensor([0, 0, 1]), 2).tolist() == [2, 0]
    assert best_per_unit(errors, torch.tensor([0, 1, 2]), 3).tolist() == [1, 2, 0]


def test_a_tie_goes_to_the_identity() -> None:
    assert best_per_unit(torch.tensor([[2.0, 3.0], [2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]), 2).tolist() == [0, 1]
