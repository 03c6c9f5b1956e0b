"""Weighted tokens and pairs of streams against loops over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.numerics.statistics import (
    PairedStatistics,
    accumulate_,
    accumulate_paired_,
    cross_moment,
    empty_paired,
    empty_statistics,
    finished,
    finished_paired,
    pooled,
    second_moment,
)


def _streams(tokens: int = 40, channels: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator) * torch.linspace(0.2, 4.0, channels)
    return x, x + 0.2 * torch.randn(tokens, channels, generator=generator)


def _paired(*parts: tuple[Tensor, ...]) -> PairedStatistics:
    found = empty_paired(parts[0][0].shape[-1])
    for x, x_hat, *rest in parts:
        found = accumulate_paired_(found, x, x_hat, *rest)
    return finished_paired(found)


# 300 channels: more than one tile of the gram
@pytest.mark.parametrize("channels", [12, 300])
def test_both_moments_equal_a_loop_over_tokens(channels: int) -> None:
    x, x_hat = _streams(channels=channels)
    weight = torch.rand(40, generator=torch.Generator().manual_seed(1))
    found = _paired((x, x_hat, None, weight))
    cross, moment = (torch.zeros(channels, channels, dtype=torch.float64) for _ in range(2))
    for token, quantized, share in zip(x.double(), x_hat.double(), weight.double(), strict=True):
        cross += share * torch.outer(token, quantized)
        moment += share * torch.outer(quantized, quantized)
    total = float(weight.double().sum())
    torch.testing.assert_close(cross_moment(found).double(), cross / total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second_moment(found.quantized).double(), moment / total, rtol=1e-4, atol=1e-5)
    assert found.quantized.weight_sum == pytest.approx(total)
    assert not torch.allclose(found.cross_gram, found.cross_gram.t())


def test_a_token_of_weight_three_is_a_token_seen_three_times() -> None:
    x, x_hat = _streams()
    times = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(2))
    repeated = _paired((x.repeat_interleave(times, dim=0), x_hat.repeat_interleave(times, dim=0)))
    weighted = _paired((x, x_hat, None, times.float()))
    torch.testing.assert_close(cross_moment(weighted), cross_moment(repeated), rtol=1e-4, atol=1e-5)
    moments = [second_moment(each.quantized) for each in (weighted, repeated)]
    torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-5)
    assert weighted.quantized.weight_sum == repeated.quantized.weight_sum == float(times.sum())
    assert not torch.allclose(moments[0], second_moment(_paired((x, x_hat)).quantized), rtol=1e-2)


def test_weights_of_one_are_no_weights() -> None:
    x, x_hat = _streams()
    plain, ones = _paired((x, x_hat)), _paired((x, x_hat, None, torch.ones(40)))
    assert torch.equal(plain.cross_gram, ones.cross_gram)
    assert torch.equal(plain.quantized.gram, ones.quantized.gram)
    assert plain.quantized.weight_sum == ones.quantized.weight_sum == 40.0


def test_means_and_maxima_of_weighted_tokens_stay_unweighted() -> None:
    x, _ = _streams()
    weight = torch.rand(40, generator=torch.Generator().manual_seed(1))
    plain = finished(accumulate_(empty_statistics(12), x))
    weighted = finished(accumulate_(empty_statistics(12), x, None, weight))
    assert torch.equal(weighted.mean_abs, plain.mean_abs)
    assert torch.equal(weighted.max_abs, plain.max_abs)
    assert not torch.allclose(second_moment(weighted), second_moment(plain), rtol=1e-3)


def test_masked_tokens_count_on_neither_stream_whatever_their_weight() -> None:
    x, x_hat = (stream.reshape(4, 10, 12) for stream in _streams())
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[2, 6:] = False
    weight = torch.rand(4, 10, generator=torch.Generator().manual_seed(1))
    poison = torch.where(mask, torch.tensor(0.0), torch.tensor(1e6))
    masked = _paired((x + poison.unsqueeze(-1), x_hat - poison.unsqueeze(-1), mask, weight + poison))
    plain = _paired((x[mask], x_hat[mask], None, weight[mask]))
    assert torch.equal(masked.cross_gram, plain.cross_gram)
    assert torch.equal(masked.quantized.gram, plain.quantized.gram)
    assert masked.quantized.weight_sum == plain.quantized.weight_sum


def test_batches_add_up_and_sums_merge_in_any_order() -> None:
    x, x_hat = _streams()
    weight = torch.rand(40, generator=torch.Generator().manual_seed(1))
    parts = [(x[part], x_hat[part], None, weight[part]) for part in (slice(0, 7), slice(7, 30), slice(30, 40))]
    at_once, batched = _paired((x, x_hat, None, weight)), _paired(*parts)
    alone = [_paired(part) for part in reversed(parts)]
    torch.testing.assert_close(batched.quantized.weight_sum, at_once.quantized.weight_sum)
    expected = second_moment(at_once.quantized)
    torch.testing.assert_close(second_moment(batched.quantized), expected, rtol=1e-4, atol=1e-5)
    whole = [finished(accumulate_(empty_statistics(12), *part[1:])) for part in parts]
    together = pooled([pooled([whole[2], whole[0]]), whole[1]])
    assert together.token_count == 40
    torch.testing.assert_close(second_moment(together), expected, rtol=1e-4, atol=1e-5)
    summed = sum(each.cross_gram for each in alone)
    for cross in (batched.cross_gram, summed):
        torch.testing.assert_close(cross, at_once.cross_gram, rtol=1e-4, atol=1e-3)


def test_no_tokens_give_zeros() -> None:
    found = finished_paired(empty_paired(5))
    assert torch.equal(cross_moment(found), torch.zeros(5, 5))
    assert torch.equal(second_moment(found.quantized), torch.zeros(5, 5))
