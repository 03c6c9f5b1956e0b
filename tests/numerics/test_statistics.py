"""Statistics against a token-by-token loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqkit.numerics.statistics import (
    Statistics,
    accumulate_,
    added_,
    all_added_,
    empty_statistics,
    finished,
    pooled,
    sampled_evenly,
    second_moment,
)


def _inputs(tokens: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, channels, generator=generator)
    mixed[:, 0] *= 30.0
    mixed[:, -1] += mixed[:, 0]  # an off-diagonal entry that matters
    return mixed


def _loop(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = tokens.shape[1]
    gram = torch.zeros(channels, channels, dtype=torch.float64)
    abs_sum, max_abs = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for x in tokens.double():
        gram += torch.outer(x, x)
        abs_sum += x.abs()
        max_abs = torch.maximum(max_abs, x.abs())
    return gram, abs_sum / len(tokens), max_abs


def _of(*parts: Tensor) -> Statistics:
    statistics = empty_statistics(parts[0].shape[-1])
    for part in parts:
        statistics = accumulate_(statistics, part)
    return statistics


# 300 channels: more than one tile of the gram, and a last tile that is not full
@pytest.mark.parametrize(("tokens", "channels"), [(40, 12), (64, 300)])
def test_every_statistic_equals_a_loop_over_tokens(tokens: int, channels: int) -> None:
    x = _inputs(tokens, channels)
    found, (gram, mean_abs, max_abs) = finished(_of(x)), _loop(x)
    assert found.token_count == tokens
    torch.testing.assert_close(found.gram.double(), gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.mean_abs.double(), mean_abs, rtol=1e-6, atol=0)
    assert torch.equal(found.max_abs.double(), max_abs)
    torch.testing.assert_close(second_moment(found).double(), gram / tokens, rtol=1e-5, atol=1e-5)


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    x = torch.full((1, 5000, 2), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum would stop at 256
    found = finished(_of(x))
    assert found.gram.dtype == torch.float32
    assert found.gram.flatten().tolist() == [5000.0] * 4
    assert found.mean_abs.tolist() == [1.0, 1.0]


def test_the_moment_is_symmetric_and_positive_semidefinite() -> None:
    x = _inputs(20, 64).to(torch.bfloat16)  # fewer tokens than channels: 44 eigenvalues are 0
    moment = second_moment(finished(_of(x)))
    assert torch.equal(moment, moment.t())
    eigenvalues = torch.linalg.eigvalsh(moment.double())
    assert float(eigenvalues.min()) > -1e-6 * float(eigenvalues.max())


def test_masked_tokens_do_not_count() -> None:
    x = _inputs(24, 16).reshape(2, 12, 16)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    poisoned = torch.where(mask.unsqueeze(-1), x, torch.tensor(1e6))
    masked = finished(accumulate_(empty_statistics(16), poisoned, mask))
    plain = finished(_of(x[mask]))
    assert masked.token_count == 19
    assert torch.equal(masked.gram, plain.gram)
    assert torch.equal(masked.mean_abs, plain.mean_abs)
    assert torch.equal(masked.max_abs, plain.max_abs)


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    mask = torch.zeros(1, 3, dtype=torch.bool)
    found = accumulate_(empty_statistics(4), torch.ones(1, 3, 4), mask)
    assert found.token_count == 0
    assert not found.gram.any()
    assert torch.equal(second_moment(finished(found)), torch.zeros(4, 4))


def test_chunks_give_what_all_tokens_at_once_give() -> None:
    x = _inputs(60, 20)
    at_once, chunked = finished(_of(x)), finished(_of(x[:7], x[7:30], x[30:]))
    assert chunked.token_count == at_once.token_count
    torch.testing.assert_close(chunked.gram, at_once.gram, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(chunked.mean_abs, at_once.mean_abs)
    assert torch.equal(chunked.max_abs, at_once.max_abs)


def test_merging_works_in_any_order_and_before_or_after_finishing() -> None:
    x = _inputs(60, 20)
    parts = [_of(x[:7]), _of(x[7:30]), _of(x[30:])]
    forward = pooled([pooled(parts[:2]), parts[2]])
    backward = pooled([parts[2], pooled(parts[1::-1])])
    late = pooled([finished(parts[1]), pooled([finished(parts[2]), finished(parts[0])])])
    gram, mean_abs, max_abs = _loop(x)
    for found in (finished(forward), finished(backward), late):
        assert found.token_count == 60
        torch.testing.assert_close(found.gram.double(), gram, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(found.mean_abs.double(), mean_abs, rtol=1e-5, atol=0)
        assert torch.equal(found.max_abs.double(), max_abs)


def test_merging_leaves_its_inputs_alone() -> None:
    first, second = _of(_inputs(5, 4)), _of(_inputs(6, 4, seed=1))
    before = first.gram.clone()
    pooled([first, second])
    assert torch.equal(first.gram, before)
    assert first.token_count == 5


def test_without_a_sample_all_the_rest_is_the_same() -> None:
    parts = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).unbind()
    with_sample, without = (
        [sampled_evenly(accumulate_(empty_statistics(8, sampled=sampled), part), 2) for part in parts]
        for sampled in (True, False)
    )
    for found, expected in (
        (
            all_added_({"": without[0]}, {"": without[1]})[""],
            all_added_({"": with_sample[0]}, {"": with_sample[1]})[""],
        ),
        (added_(without[1], without[0]), added_(with_sample[1], with_sample[0])),
        (pooled(without), pooled(with_sample)),
    ):
        assert found.sample is None and expected.sample is not None and len(expected.sample) > 0
        assert found.token_count == expected.token_count and found.weight_sum == expected.weight_sum
        for values in ("abs_sum", "max_abs", "gram"):
            assert torch.equal(getattr(found, values), getattr(expected, values))
