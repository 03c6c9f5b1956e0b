"""A token that counts twice is a token that is there twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_contexts import CPU, GROUP, block_context, token_ids
from tiny_models import tiny_model

from awqkit import Recipe
from awqkit.numerics.statistics import second_moment
from awqkit.pipeline import block_step
from awqkit.pipeline.activations import TokenRows
from awqkit.pipeline.block_step import Observed, observe_block, prove_block, quantize_observed
from awqkit.pipeline.context import BlockContext, Streams
from awqkit.pipeline.start_streams import start_streams

ROWS = token_ids(6, 24)
RECIPE = Recipe.preset("balanced", group_size=GROUP, bits=3)


def _streams(context: BlockContext, rows: TokenRows) -> Streams:
    return start_streams(context.skeleton, RECIPE, rows, None, CPU, lambda index: None)


def _observed(context: BlockContext, rows: TokenRows) -> Observed:
    return observe_block(context, _streams(context, rows), (RECIPE,))


def test_weights_count_as_repeated_rows_do_on_both_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    paired = {}
    observe_pair = block_step.observe_pair

    def keep(context: object, entry: object, *rest: object) -> object:
        found = observe_pair(context, entry, *rest)
        paired.setdefault(entry.first, []).append(found)
        return found

    monkeypatch.setattr(block_step, "observe_pair", keep)
    context = block_context(tiny_model("llama"), recipe=RECIPE)
    once, own = TokenRows(ROWS[:4]), TokenRows(ROWS[4:])
    for rows in (once.joined(own.weighing(2.0)), once.joined(own).joined(own)):
        streams = _streams(context, rows)
        proofs = prove_block(context, streams.probe)
        streams.calibration.quantized.write(slice(0, 1), 1.01 * streams.calibration.original.rows_of(slice(0, 1)))
        observed = observe_block(context, streams, (RECIPE,))
        quantize_observed(context, proofs, observed, streams.calibration.quantized, None, lambda stage: None)
    for weighted, repeated in paired.values():
        assert weighted.quantized.weight_sum == repeated.quantized.weight_sum == (4 + 2 * 2) * ROWS.shape[1]
        torch.testing.assert_close(
            weighted.quantized.gram,
            repeated.quantized.gram,
            rtol=1e-3,
            atol=1e-3 * float(repeated.cross_gram.abs().max()),
        )
        torch.testing.assert_close(
            weighted.cross_gram, repeated.cross_gram, rtol=1e-3, atol=1e-3 * float(repeated.cross_gram.abs().max())
        )


def test_weights_reach_the_statistics_of_the_original() -> None:
    context = block_context(tiny_model("llama"), recipe=RECIPE)
    once, own = TokenRows(ROWS[:4]), TokenRows(ROWS[4:])
    weighted = _observed(context, once.joined(own.weighing(2.0))).statistics
    repeated = _observed(context, once.joined(own).joined(own)).statistics
    plain = _observed(context, once.joined(own)).statistics
    for name, found in weighted.items():
        expected = second_moment(repeated[name])
        torch.testing.assert_close(second_moment(found), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert float((second_moment(plain[name]) - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def test_what_a_token_costs_and_what_it_counts_multiply() -> None:
    class Felt:
        def token_weight(self, block: int) -> torch.Tensor:
            return torch.full((2, 3), 0.5 + block)

    context = block_context(tiny_model("llama"), recipe=RECIPE)
    streams = replace(_streams(context, TokenRows(ROWS)), gradients=Felt(), weights=torch.full((2, 3), 4.0))
    assert bool((streams.token_weight(1) == 6.0).all())
    assert bool((replace(streams, weights=None).token_weight(1) == 1.5).all())
    assert bool((replace(streams, gradients=None).token_weight(1) == 4.0).all())
    assert replace(streams, gradients=None, weights=None).token_weight(1) is None
